"""The server's options: each wrong value is refused with its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from outrider.errors import OptionError
from outrider.server.options import ServerOptions


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"port": -1}, "port must be a number from 0 to 65535: -1"),
        ({"port": "80"}, "port must be a whole number"),
        ({"tool_call_parser": "xml"}, "tool_call_parser must be hermes or llama: 'xml'"),
        ({"reasoning_parser": ""}, "reasoning_parser must be think: ''"),
        ({"max_waiting": -1}, "max_waiting"),
        ({"max_body_bytes": 0}, "max_body_bytes"),
        ({"max_header_bytes": 100}, "max_header_bytes must be a whole number of 1024 or more"),
        ({"max_connections": 0}, "max_connections"),
        ({"receive_timeout": 0.0}, "receive_timeout must be a number of seconds above 0"),
        ({"send_timeout": float("nan")}, "send_timeout"),
        ({"drain_timeout": 0.0}, "drain_timeout"),
        ({"engine_timeout": float("nan")}, "engine_timeout"),
        ({"drain_timeout": float("inf")}, "drain_timeout"),
        ({"root_path": "x"}, "root_path"),
        ({"root_path": "/x/"}, "root_path"),
        ({"request_timeout": 0.0}, "request_timeout"),
        ({"log_format": "xml"}, "log_format must be one of text, json: 'xml'"),
        ({"allowed_origin": ["https://a.org", "https://b.org/"]}, "allowed_origin must be .* 'https://b.org/'"),
        ({"allowed_origin": ["a.org"]}, "allowed_origin"),
        ({"allowed_origin": ["https://*.a.org"]}, "allowed_origin"),
        ({"allowed_origin": ["https://A.org"]}, "allowed_origin"),
        ({"allowed_origin": ["https://a.org:443"]}, "allowed_origin"),
        ({"allowed_origin": ["http://a.org:80"]}, "allowed_origin"),
        ({"allowed_origin": "https://a.org"}, "allowed_origin"),
        ({"ssl_keyfile": "key.pem"}, "needs ssl_certfile"),
        ({"otlp_traces_endpoint": "localhost:4318"}, "otlp_traces_endpoint must be an http or https URL"),
    ],
)
def test_wrong_values(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        ServerOptions(**given)


@pytest.mark.parametrize(
    "origin", ["*", "https://a.org", "http://a.org:443", "http://localhost:5173", "http://[::1]:8080", "app://x-y_z"]
)
def test_origins(origin: str) -> None:
    assert ServerOptions(allowed_origin=[origin]).allowed_origin == [origin]


def test_certificates_are_looked_at_first(tmp_path: Path) -> None:
    path = tmp_path / "cert.pem"
    path.write_text("no certificate")
    for certificate in (path, tmp_path / "none.pem"):
        with pytest.raises(OptionError, match=r"no certificate with its private key.*\.pem"):
            ServerOptions(ssl_certfile=str(certificate)).check_certificate()
    ServerOptions().check_certificate()


def test_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n\n two \n")
    assert ServerOptions().keys(None) == ()
    assert ServerOptions(api_key="a").keys("b") == ("a", "b")
    assert ServerOptions(api_key_file=str(path)).keys(None) == ("one", "two")
    path.write_text("\n")
    with pytest.raises(OptionError, match="holds no key"):
        ServerOptions(api_key_file=str(path)).keys(None)
    for wrong in ("", "é", "a\nb"):
        with pytest.raises(OptionError, match="printable ASCII"):
            ServerOptions(api_key=wrong).keys(None)
