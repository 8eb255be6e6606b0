"""The server's life: start the engine, listen, drain when told to end, and end badly if the engine does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from outrider import env
from outrider.config import EngineOptions
from outrider.engine.messages import Facts
from outrider.engine.process import LOG_FORMAT
from outrider.errors import EngineDeadError, OptionError
from outrider.server.app import build
from outrider.server.client import EngineClient
from outrider.server.metrics import Metrics
from outrider.server.options import ServerOptions
from outrider.server.service import Service
from outrider.server.text import Texts

logger = logging.getLogger("outrider")

BUNDLED_NAME = "outrider-bundled"

LINGER_SECONDS = 2.0
"""How long the server of a dead engine says so, to probes and clients, before it ends."""

BACKLOG = 2048


@dataclass(frozen=True, slots=True)
class Listening:
    """What is told when requests can be sent."""

    url: str
    model: str
    facts: Facts


def serve(engine: EngineOptions, directory: Path, options: ServerOptions, told: Callable[[Listening], None]) -> int:
    """Serves until told to end by SIGTERM or SIGINT: exit code 0, or 1 if the engine died.

    `directory`: of the checkpoint and its tokenizer. Raises what building an Engine raises, and OptionError for an
    address that cannot be had.
    """
    keys = options.keys(env.api_key())
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    for name in ("httpx", "asyncio", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with contextlib.closing(_bound(options)) as listener:
        return asyncio.run(_serve(engine, directory, options, keys, listener, told))


async def _serve(
    engine: EngineOptions,
    directory: Path,
    options: ServerOptions,
    keys: tuple[str, ...],
    listener: socket.socket,
    told: Callable[[Listening], None],
) -> int:
    client = EngineClient(engine, options.engine_timeout)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for end in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(end, stopped.set)
    try:
        started: asyncio.Future[Any] = asyncio.gather(client.start(), asyncio.to_thread(Texts, directory))
        waiting: asyncio.Future[Any] = loop.create_task(stopped.wait())
        await asyncio.wait({started, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not started.done():
            started.cancel()
            return 0
        facts, texts = started.result()
        name = options.served_model_name or _name(engine.model)
        service = Service(client, facts, texts, Metrics(client, facts, name), name, options.max_waiting)
        app = build(service, keys, options.max_body_bytes, options.root_path)
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=int(options.drain_timeout) + 2,
        )
        server = _Server(config, lambda: told(Listening(_url(listener, options.host), name, facts)))
        life = _Life(server, service, options.drain_timeout)
        client.on_death = life.bury
        for end in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(end, life.drain)
        if stopped.is_set():
            return 0
        await server.serve(sockets=[listener])
        texts.close()
        return 0 if client.alive else 1
    finally:
        await client.close()


class _Server(uvicorn.Server):
    """uvicorn's, told to end by us rather than by signals, and telling when it listens."""

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
    """How a server ends."""

    server: _Server
    service: Service
    drain_timeout: float

    def drain(self) -> None:
        """Takes no new connections, and gives what is under way its time. Told a second time, it ends at once."""
        if self.service.draining:
            self.server.force_exit = True
            return
        logger.info("draining: %d completions are under way", self.service.client.num_under_way)
        self.service.draining = True
        self.server.should_exit = True
        asyncio.get_running_loop().call_later(self.drain_timeout, self._give_up)

    def _give_up(self) -> None:
        self.service.client.fail(EngineDeadError("the server went down before the request was finished"))

    def bury(self) -> None:
        """The engine is dead, and everybody who waited for it was told: ends after those who ask next."""

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


def _url(listener: socket.socket, host: str) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


def _name(model: str | None) -> str:
    """A model's name to clients: a hub id as it is, a directory's last part."""
    if model is None:
        return BUNDLED_NAME
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
