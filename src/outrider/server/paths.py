"""Paths that are treated specially: those of the playground, those without a key, those that are polled."""

from __future__ import annotations

PLAYGROUND = {
    "/": "index.html",
    **{
        f"/playground/{name}": name
        for name in (
            "api.js",
            "app.js",
            "chart.js",
            "icon.svg",
            "panel.js",
            "race.js",
            "request.js",
            "style.css",
            "tokens.js",
        )
    },
}
"""Which file of the playground is shown where. None says anything of what is served: that is asked for with a key."""

OPEN_PATHS = frozenset({"/health", "/version", "/metrics", *PLAYGROUND})
"""What needs no API key: a probe has none, nor has a browser before its page has asked for one."""

POLLED_PATHS = frozenset({"/playground/state"})
"""What a page asks for every second: no line in the log and no span, unless it goes wrong."""
