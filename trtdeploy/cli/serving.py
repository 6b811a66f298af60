"""``trtdeploy serve``."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from trtdeploy.cli.console import door, finite_seconds, interrupt, print_json

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})(serve)


def serve(
    context: typer.Context,
    repository: Annotated[Path, typer.Argument(help="A model repository.")],
    tritonserver: Annotated[
        Path | None,
        typer.Option("--tritonserver", help="The server [default: PATH, the container's place, nvidia-pytriton's]."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option("--http-port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option("--grpc-port", min=0, max=65535, help="0 takes a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option("--metrics-port", min=0, max=65535, help="0 takes a free one.")] = 8002,
    ready_timeout: Annotated[
        float,
        typer.Option(
            "--ready-timeout", min=0.001, callback=finite_seconds, help="Seconds until all models must be ready."
        ),
    ] = 120.0,
    drain_timeout: Annotated[
        float,
        typer.Option(
            "--drain-timeout", min=0, callback=finite_seconds, help="Seconds for running requests at the end."
        ),
    ] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Serve a model repository with Triton until Ctrl-C or SIGTERM; its log goes to stderr.

    Prints one line that begins with "ready" when every model is. What follows "--" goes to tritonserver as it is.
    """
    with door():
        from trtdeploy.triton.installation import find_tritonserver
        from trtdeploy.triton.server import TritonServer

        signal.signal(signal.SIGTERM, interrupt)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
            signal.signal(signal.SIGHUP, interrupt)
        server = TritonServer(
            repository,
            find_tritonserver(tritonserver),
            host=host,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            log=lambda line: typer.echo(line, err=True),
            options=context.args,
            ready_timeout_s=ready_timeout,
            drain_timeout_s=drain_timeout,
        )
        with server:
            try:
                if as_json:
                    print_json({"http": server.http_url, "grpc": server.grpc_url, "models": server.models})
                else:
                    typer.echo(f"ready: {', '.join(server.models)} at {server.http_url} and {server.grpc_url}")
                server.wait()
            except KeyboardInterrupt:
                with suppress(OSError):  # stderr may have gone with the terminal
                    typer.echo("stopping", err=True)
