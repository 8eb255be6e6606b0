"""`outrider serve`: the OpenAI-compatible server."""

from __future__ import annotations

import json
import logging

import typer
from rich.markup import escape

from outrider.cli.common import (
    UNFAITHFUL,
    Drafting,
    Json,
    Model,
    drafting_flags,
    engine_flags,
    engine_options,
    err,
    loading,
    out,
    say_if_unfaithful,
    starting,
)
from outrider.cli.flags import with_flags
from outrider.errors import OptionError
from outrider.options import EngineOptions
from outrider.server.options import ServerOptions

logger = logging.getLogger("outrider")

server_flags = with_flags(ServerOptions, "server")


@engine_flags
@drafting_flags
@server_flags
def serve(
    engine: EngineOptions,
    drafting: Drafting,
    server: ServerOptions,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients expect it. Ends on SIGTERM or Ctrl-C, after the running requests."""
    with starting():
        from outrider.config import resolve

        options = engine_options(engine, drafting, model)
        resolved = resolve(options)
    resolved.served_by()  # what cannot be served is refused here, before a process is started for it
    try:
        from outrider.server.serve import Listening
        from outrider.server.serve import serve as run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "outrider":
            raise
        raise OptionError(f"serving needs {error.name}: outrider doctor says how to get it") from None

    def announce(listening: Listening) -> None:
        facts = listening.facts
        if server.log_format == "text":
            say_if_unfaithful(facts.faithful, facts.verifier)
        elif not facts.faithful:
            logger.warning(UNFAITHFUL, facts.verifier)
        if as_json:
            typer.echo(json.dumps({"url": listening.url, "model": listening.model}))
            return
        drafts = f"drafting {facts.method}, {facts.num_speculative_tokens} tokens a round; " if facts.method else ""
        out.print(f"serving [bold]{escape(listening.model)}[/] on [bold green]{listening.url}[/]")
        out.print(f"[dim]{drafts}runner {facts.runner}; Ctrl-C ends it after the running requests[/]")

    for_people = not as_json and server.log_format == "text"
    if for_people:
        err.print("[dim]loading the model, and preparing kernels (compiled on the first run only)[/]")
    quiet = not for_people or not err.is_interactive
    raise typer.Exit(run(options, resolved.directory, server, announce, lambda: loading(quiet)))
