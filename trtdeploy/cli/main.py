"""The command ``trtdeploy``."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from trtdeploy.cli import build, cache, doctor, ledger, lint, plans, quantize, quickstart, train
from trtdeploy.cli.console import interrupt, show_warnings
from trtdeploy.cli.serving import load, package, serve, validate, versions
from trtdeploy.version import __version__

app = typer.Typer(
    name="trtdeploy",
    help="From a trained network to a verified INT8 service.\n\n"
    "Exit codes: 0 ok, 1 a gate or check failed, 2 wrong usage or input, 3 this machine lacks what was asked for.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (
    quickstart,
    doctor,
    train,
    quantize,
    lint,
    build,
    plans,
    cache,
    package,
    versions,
    serve,
    validate,
    load,
    ledger,
):
    module.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trtdeploy {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself."""


def main() -> None:
    """Run the command line."""
    show_warnings()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell lets its background jobs ignore it
        signal.signal(signal.SIGINT, interrupt)
    app()
