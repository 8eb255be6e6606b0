"""The `outrider` command. Wrong input ends with one clear line and exit code 2."""

from __future__ import annotations

import sys

import typer
from rich.markup import escape

from outrider import __version__
from outrider.cli import accept, bench, doctor, explain, generate, serve, train
from outrider.cli.common import err, print_json
from outrider.errors import OutriderError

app = typer.Typer(
    name="outrider",
    help="An LLM inference engine built around speculative decoding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve.serve)
app.command("generate")(generate.generate)
app.command("explain")(explain.explain)
app.command("accept")(accept.accept)
app.command("train")(train.train)
app.command("doctor")(doctor.doctor)
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"outrider {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="print the version"),
) -> None:
    """An LLM inference engine built around speculative decoding."""


def main() -> None:
    """Runs the command line; what the user can mend becomes one line on stderr and exit code 2."""
    try:
        app()
    except OutriderError as error:
        if "--json" in sys.argv:
            print_json({"error": str(error), "type": type(error).__name__})
        err.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    main()
