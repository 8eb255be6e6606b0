"""What the server is asked to be. Nothing here needs the libraries that serving needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from outrider.core.option import option, wrong_types
from outrider.errors import OptionError

TOOL_CALL_PARSERS = ("hermes", "llama")
REASONING_PARSERS = ("think",)

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


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where to listen, whom to let in, and how much to take."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is every one the machine has")
    port: int = option(8000, "port to listen on; 0 takes a free one and says which")
    served_model_name: str | None = option(None, "name of the model to clients; left out: that of its directory")
    tool_call_parser: str | None = option(
        None, "how the model writes tool calls, hermes or llama; left out: as its chat template does, if that is clear"
    )
    reasoning_parser: str | None = option(
        None, "think: tell what the model writes in <think> tags apart from its answer"
    )
    api_key: str | None = option(None, "key that clients must send; OUTRIDER_API_KEY and --api-key-file hide it better")
    api_key_file: str | None = option(None, "file of keys, one a line; each of them lets a client in")
    max_waiting: int = option(256, "completions that may wait for a place to run; more are told to come back (429)")
    max_body_bytes: int = option(4 << 20, "largest request body; a larger one is refused (413)")
    drain_timeout: float = option(60.0, "seconds that requests under way have to end after SIGTERM")
    engine_timeout: float = option(120.0, "seconds without a sign of life after which the engine counts as hung")
    root_path: str = option("", "path under which a proxy shows the server")

    def __post_init__(self) -> None:
        for name, value, wanted in wrong_types(self):
            raise OptionError(f"{name} must be {wanted}: {value!r}")
        if not 0 <= self.port <= 65535:
            raise OptionError(f"port must be a number from 0 to 65535: {self.port}")
        for name, known in (("tool_call_parser", TOOL_CALL_PARSERS), ("reasoning_parser", REASONING_PARSERS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise OptionError(f"{name} must be {' or '.join(known)}: {value!r}")
        if self.max_waiting < 0:
            raise OptionError(f"max_waiting must be a whole number of 0 or more: {self.max_waiting}")
        if self.max_body_bytes < 1:
            raise OptionError(f"max_body_bytes must be a whole number of 1 or more: {self.max_body_bytes}")
        for name in ("drain_timeout", "engine_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise OptionError(f"{name} must be a number of seconds above 0: {getattr(self, name)}")
        if self.root_path and not self.root_path.startswith("/"):
            raise OptionError(f"root_path must begin with a slash: {self.root_path!r}")

    def keys(self, from_environment: str | None) -> tuple[str, ...]:
        """Every key that lets a client in; none: everybody may. OptionError for a file that gives none."""
        keys = [key for key in (self.api_key, from_environment) if key is not None]
        if self.api_key_file is not None:
            try:
                lines = Path(self.api_key_file).expanduser().read_text().split()
            except (OSError, UnicodeDecodeError) as error:
                raise OptionError(f"cannot read api_key_file {self.api_key_file}: {error}") from None
            if not lines:
                raise OptionError(f"api_key_file {self.api_key_file} holds no key: write one a line")
            keys += lines
        if any(not key or not key.isascii() or not key.isprintable() for key in keys):
            raise OptionError("an API key must be printable ASCII and not empty, as it travels in a header")
        return tuple(keys)
