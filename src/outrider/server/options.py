"""What the server is asked to be. Nothing here needs the libraries that serving needs."""

from __future__ import annotations

import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from outrider.core.option import option, wrong_types
from outrider.core.reading import written_short
from outrider.engine.process.logs import LOG_FORMATS
from outrider.errors import OptionError

TOOL_CALL_PARSERS = ("hermes", "llama")
REASONING_PARSERS = ("think",)

_ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::(?P<port>[1-9][0-9]{0,4}))?")
"""An origin as browsers write one: in lower case, without the scheme's own port."""

_OWN_PORTS = {("http", "80"), ("https", "443")}


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where to listen, whom to let in, and how much to take."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is every one the machine has")
    port: int = option(8000, "port to listen on; 0 takes a free one and says which")
    served_model_name: str | None = option(
        None, "name of the model to clients; left out: its Hugging Face id, or the last part of its directory"
    )
    chat_template: str | None = option(
        None, "file of a chat template, or the name of one of the checkpoint's; left out: the checkpoint's own"
    )
    tool_call_parser: str | None = option(
        None, "how the model writes tool calls, hermes or llama; left out: as its chat template does, if that is clear"
    )
    reasoning_parser: str | None = option(
        None, "think: tell what the model writes in <think> tags apart from its answer"
    )
    api_key: str | None = option(None, "key that clients must send; OUTRIDER_API_KEY and --api-key-file hide it better")
    api_key_file: str | None = option(None, "file of keys, one a line; each of them lets a client in")
    max_waiting: int = option(256, "completions that may wait for a place to run; more are answered 429")
    max_body_bytes: int = option(4 << 20, "largest request body; a larger one is refused (413)")
    max_header_bytes: int = option(64 << 10, "largest head of a request; a larger one is refused (431)")
    max_connections: int = option(
        2048, "connections at once; one more closes the one that is longest without a request, or is refused (503)"
    )
    receive_timeout: float = option(30.0, "seconds in which a request must have come whole, or is refused (408)")
    send_timeout: float = option(30.0, "seconds after which a client that reads nothing of its answer is cut off")
    drain_timeout: float = option(60.0, "seconds that running requests have to end after SIGTERM")
    engine_timeout: float = option(120.0, "seconds without a sign of life after which the engine counts as hung")
    root_path: str = option("", "path under which a proxy shows the server")
    allowed_origin: Sequence[str] | None = option(
        None,
        "origin whose pages a browser lets read answers (CORS), as https://example.org; * is every one; repeatable",
    )
    ssl_certfile: str | None = option(None, "certificate chain (PEM); with it the server answers HTTPS")
    ssl_keyfile: str | None = option(None, "private key of the certificate (PEM), if it is not in the same file")
    request_timeout: float | None = option(
        None, "most seconds a request may take, after which it ends with an error (408); left out: no limit"
    )
    restart_engine: bool = option(False, "restart the engine when it dies or hangs, instead of ending")
    log_format: str = option("text", "text, or json: one JSON object a line")
    otlp_traces_endpoint: str | None = option(
        None, "URL to send OpenTelemetry traces to over HTTP, as http://localhost:4318/v1/traces"
    )

    def __post_init__(self) -> None:
        for name, value, wanted in wrong_types(self):
            raise OptionError(f"{name} must be {wanted}: {written_short(value)}")
        if not 0 <= self.port <= 65535:
            raise OptionError(f"port must be a number from 0 to 65535: {self.port}")
        for name, known in (("tool_call_parser", TOOL_CALL_PARSERS), ("reasoning_parser", REASONING_PARSERS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise OptionError(f"{name} must be {' or '.join(known)}: {written_short(value)}")
        if self.max_waiting < 0:
            raise OptionError(f"max_waiting must be a whole number of 0 or more: {self.max_waiting}")
        for name, low in (("max_body_bytes", 1), ("max_header_bytes", 1024), ("max_connections", 1)):
            if getattr(self, name) < low:
                raise OptionError(f"{name} must be a whole number of {low} or more: {getattr(self, name)}")
        for name in ("drain_timeout", "engine_timeout", "request_timeout", "receive_timeout", "send_timeout"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise OptionError(f"{name} must be a number of seconds above 0: {getattr(self, name)}")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise OptionError(
                f"root_path must begin with a slash, and not end with one: {written_short(self.root_path)}"
            )
        for origin in self.allowed_origin or ():
            written = _ORIGIN.fullmatch(origin)
            if origin != "*" and (written is None or written.group("scheme", "port") in _OWN_PORTS):
                raise OptionError(
                    "allowed_origin must be as a browser writes it, https://example.org or http://localhost:5173: in"
                    f" lower case, without a path, a wildcard or the scheme's own port; or *: {written_short(origin)}"
                )
        if self.log_format not in LOG_FORMATS:
            raise OptionError(f"log_format must be one of {', '.join(LOG_FORMATS)}: {written_short(self.log_format)}")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise OptionError("ssl_keyfile needs ssl_certfile: give the certificate too")
        url = self.otlp_traces_endpoint
        if url is not None and not url.startswith(("http://", "https://")):
            raise OptionError(f"otlp_traces_endpoint must be an http or https URL: {written_short(url)}")

    def check_certificate(self) -> None:
        """OptionError if TLS is asked for with files that hold no usable certificate and key."""
        if self.ssl_certfile is None:
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

        def password() -> str:
            raise OptionError("the private key is encrypted: give ssl_keyfile a key without a passphrase")

        try:
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, password)
        except OSError as error:  # SSLError is one
            files = " and ".join(name for name in (self.ssl_certfile, self.ssl_keyfile) if name)
            raise OptionError(f"no certificate with its private key can be read from {files}: {error}") from None

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
            raise OptionError(
                "an API key must be printable ASCII and not empty, as it travels in a header; unset OUTRIDER_API_KEY"
                " if it is not meant to be one"
            )
        return tuple(keys)
