"""The server's life: start the engine, listen, drain at SIGTERM, and end with exit code 1 if the engine dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from outrider import env
from outrider.engine.process.client import Counted, EngineClient
from outrider.engine.process.logs import write_logs
from outrider.engine.process.messages import Facts
from outrider.errors import EngineDeadError, OptionError
from outrider.options import EngineOptions
from outrider.server.app import build
from outrider.server.http.connection import ConnectionLimits
from outrider.server.http.metrics import Metrics
from outrider.server.http.tracing import Tracing
from outrider.server.options import ServerOptions
from outrider.server.service import Service
from outrider.server.tokenizer_service import TokenizerService

logger = logging.getLogger("outrider")

BUNDLED_NAME = "outrider-bundled"

LINGER_SECONDS = 2.0
"""How long the server of a dead engine says so, to probes and clients, before it ends."""

BACKLOG = 2048

SPARE_FILES = 256
"""Open files of a server besides its connections."""

Bars = Callable[[], contextlib.AbstractContextManager[tuple[Counted | None, Counted | None]]]
"""What is shown while the engine starts: callbacks for weights loaded, and for programs recorded."""

MAX_RESTARTS = 3
"""Engines started in a row, each after one that did not last; then the server ends."""

LASTING_SECONDS = 60.0
"""An engine that has lived so long does not count as failing in a row with those before it."""

BACKOFF_SECONDS = 0.5
"""Before the second engine in a row is started; doubled before each that follows."""


@dataclass(frozen=True, slots=True)
class Listening:
    """What the server reports once it takes requests."""

    url: str
    model: str
    facts: Facts


def serve(
    engine: EngineOptions, directory: Path, options: ServerOptions, listening: Callable[[Listening], None], bars: Bars
) -> int:
    """Serves until SIGTERM or SIGINT: exit code 0, or 1 if the engine died.

    `directory`: of the checkpoint and its tokenizer. Raises what building an Engine raises, and OptionError for an
    address that cannot be had.
    """
    keys = options.keys(env.api_key())
    options.check_certificate()
    write_logs(options.log_format, logging.INFO)
    for name in ("httpx", "asyncio", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with contextlib.closing(_bound(options)) as listener:
        return asyncio.run(_serve(engine, directory, options, keys, listener, listening, bars))


async def _serve(
    engine: EngineOptions,
    directory: Path,
    options: ServerOptions,
    keys: tuple[str, ...],
    listener: socket.socket,
    listening: Callable[[Listening], None],
    bars: Bars,
) -> int:
    name = options.served_model_name or _name(engine.model)
    tracing = Tracing.to(options.otlp_traces_endpoint, name) if options.otlp_traces_endpoint is not None else None
    client = EngineClient(engine, options.engine_timeout, options.log_format)
    life: _Life | None = None
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for end in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(end, stopped.set)
    try:
        parsers = options.tool_call_parser, options.reasoning_parser
        loading = asyncio.to_thread(TokenizerService, directory, *parsers, options.chat_template)
        with bars() as counted:
            started: asyncio.Future[Any] = asyncio.gather(client.start(*counted), loading)
            waiting: asyncio.Future[Any] = loop.create_task(stopped.wait())
            await asyncio.wait({started, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not started.done():
            started.cancel()
            return 0
        facts, tokenizer = started.result()
        metrics = Metrics(client, facts, name)
        service = Service(
            client, facts, tokenizer, metrics, name, options.max_waiting, options.request_timeout, tracing
        )
        app = build(service, keys, options.max_body_bytes, options.root_path, options.allowed_origin or ())
        config = uvicorn.Config(
            app,
            http=_limits(options).protocol(),  # type: ignore[arg-type]
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=int(options.drain_timeout) + 2,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
        )
        server = _Server(config, lambda: listening(Listening(_url(listener, options), name, facts)))
        life = _Life(server, service, options.drain_timeout, options.restart_engine)
        client.on_death = life.bury
        if client.cause_of_death is not None:  # after it was ready, while the tokenizer was still loaded
            raise client.cause_of_death
        for end in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(end, life.drain)
        if stopped.is_set():
            return 0
        await server.serve(sockets=[listener])
        tokenizer.close()
        return 0 if client.alive or client.restarting else 1
    finally:
        if life is not None:
            await life.end_restarting()
        await client.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)


class _Server(uvicorn.Server):
    """uvicorn's, ended by `_Life` instead of by signals. It reports when it listens."""

    def __init__(self, config: uvicorn.Config, listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._listening = listening

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and says so."""
        await super().startup(sockets)
        self._listening()


@dataclass(slots=True)
class _Life:
    """How a server ends, or goes on with another engine."""

    server: _Server
    service: Service
    drain_timeout: float
    restarts: bool
    _restarting: asyncio.Task[None] | None = None
    _num_failed: int = 0  # engines in a row
    _ready: float = field(default_factory=time.monotonic)  # since when there has been an engine

    def drain(self) -> None:
        """Takes no new connections, and gives what is in flight its time. A second call ends it at once."""
        if self.service.draining:
            self.server.force_exit = True
            self._give_up()
            for connection in list(self.server.server_state.connections):
                connection.transport.abort()  # or closing the listener waits for them, from Python 3.12 on
            return
        logger.info("draining: %d completions are running", self.service.client.num_in_flight)
        self.service.draining = True
        self.server.should_exit = True
        asyncio.get_running_loop().call_later(self.drain_timeout, self._give_up)

    def _give_up(self) -> None:
        self.service.client.fail(EngineDeadError("the server went down before the request was finished"))

    def bury(self) -> None:
        """The engine is dead, and every waiting request has failed: another follows, or the server ends."""
        if self._restarting is not None and not self._restarting.done():
            return  # it died before `restart` returned, which handles it
        if not self.restarts or self.service.draining:
            self._end_soon()
            return
        if time.monotonic() - self._ready > LASTING_SECONDS:
            self._num_failed = 0
        self.service.client.restarting = True
        self._restarting = asyncio.get_running_loop().create_task(self._restart())

    async def _restart(self) -> None:
        client = self.service.client
        while (failed := self._num_failed) < MAX_RESTARTS:
            self._num_failed += 1
            await asyncio.sleep(BACKOFF_SECONDS * (2**failed - 1))
            logger.warning("restarting the engine, number %d of at most %d in a row", failed + 1, MAX_RESTARTS)
            try:
                facts = await client.restart()
            except EngineDeadError as error:
                logger.error("%s", error)
                continue
            self.service.facts = facts
            self.service.metrics.restarted(facts)
            self._ready = time.monotonic()
            logger.warning("the engine is ready again")
            return
        logger.error("the engine failed after %d starts in a row: the server ends", MAX_RESTARTS)
        client.restarting = False
        self._end_soon()

    async def end_restarting(self) -> None:
        """Nothing is started any more."""
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.gather(self._restarting, return_exceptions=True)

    def _end_soon(self) -> None:
        """Ends after those who ask next."""

        def end() -> None:
            self.server.should_exit = True

        asyncio.get_running_loop().call_later(LINGER_SECONDS, end)


def _bound(options: ServerOptions) -> socket.socket:
    """A socket at the address, taken before anything is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )[0]
        listener = socket.socket(family, kind, protocol)  # asyncio sets TCP_NODELAY only on one that names its protocol
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise OptionError(f"cannot listen on {options.host} port {options.port}: {error.strerror or error}") from None
    return listener


def _limits(options: ServerOptions) -> ConnectionLimits:
    """What connections may cost. Raises the process's limit of open files to hold them, or says that it is too low."""
    needed = options.max_connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < needed:
            logger.warning(
                "max_connections %d needs %d open files, and the system allows %d: raise ulimit -n, or lower it",
                options.max_connections,
                needed,
                hard,
            )
    return ConnectionLimits(
        options.max_connections,
        options.max_header_bytes,
        options.max_body_bytes,
        options.receive_timeout,
        options.send_timeout,
    )


def _url(listener: socket.socket, options: ServerOptions) -> str:
    scheme = "http" if options.ssl_certfile is None else "https"
    shown = f"[{options.host}]" if ":" in options.host else options.host
    return f"{scheme}://{shown}:{listener.getsockname()[1]}"


def _name(model: str | None) -> str:
    """A model's name to clients: a hub id as it is, a directory's last part."""
    if model is None:
        return BUNDLED_NAME
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
