"""``trtdeploy serve``."""

from __future__ import annotations

import signal
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from trtdeploy.cli.console import door, finite_seconds, interrupt, print_json
from trtdeploy.cli.options.local_folder import local_folder


class LogLevel(str, Enum):
    """How much the server says."""

    error = "error"
    warning = "warning"
    info = "info"
    verbose = "verbose"


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})(serve)


def serve(
    context: typer.Context,
    repository: Annotated[Path, typer.Argument(callback=local_folder, help="A model repository.")],
    tritonserver: Annotated[
        Path | None,
        typer.Option("--tritonserver", help="The server (default: PATH, the container's place, nvidia-pytriton's)."),
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
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="Load only the repository's ensembles, and the models that they run.")
    ] = False,
    explicit: Annotated[
        bool,
        typer.Option(
            "--explicit",
            help="Let clients load and unload models. Whoever may do that can run code here: restrict it.",
        ),
    ] = False,
    load: Annotated[
        list[str] | None,
        typer.Option("--load", help="With --explicit: a model to load at the start; repeatable (default: all)."),
    ] = None,
    restrict: Annotated[
        list[str] | None,
        typer.Option(
            "--restrict",
            metavar="APIS:KEY=VALUE",
            help="Endpoints, as in health,model-repository, that want the header KEY (gRPC: "
            "triton-grpc-protocol-KEY) with this value; repeatable.",
        ),
    ] = None,
    grpc_tls_cert: Annotated[
        Path | None, typer.Option("--grpc-tls-cert", dir_okay=False, help="PEM certificate: gRPC speaks TLS.")
    ] = None,
    grpc_tls_key: Annotated[
        Path | None, typer.Option("--grpc-tls-key", dir_okay=False, help="PEM key of the certificate.")
    ] = None,
    grpc_tls_root: Annotated[
        Path | None,
        typer.Option("--grpc-tls-root", dir_okay=False, help="PEM authorities; clients need a certificate of theirs."),
    ] = None,
    http_max_input_size: Annotated[
        int | None,
        typer.Option(
            "--http-max-input-size",
            min=1,
            metavar="BYTES",
            help="Largest request over HTTP (default: the server's, 64 MiB). promote --url sends a version's files in "
            "one, which needs 4/3 of their size.",
        ),
    ] = None,
    log_level: Annotated[
        LogLevel, typer.Option("--log-level", help="What the server says: error, warning, info or verbose.")
    ] = LogLevel.info,
    as_json: AsJson = False,
) -> None:
    """Serve a model repository with Triton until Ctrl-C or SIGTERM; its log goes to stderr.

    Prints one line that begins with "ready" when every model is. What follows "--" goes to tritonserver as it is.
    At the end no request is accepted any more, and those that run are answered within --drain-timeout.

    Security: a plan and a Python-backend model are programs; serve only what you have built or got over a channel that
    you trust. Triton authenticates nobody: keep it off untrusted networks, behind a gateway. HTTP has no TLS here, and
    the value of --restrict can be seen in the list of this machine's processes.
    """
    with door():
        from trtdeploy.triton.server.installation import find_tritonserver
        from trtdeploy.triton.server.options import ServerOptions
        from trtdeploy.triton.server.process import TritonServer

        options = ServerOptions(
            explicit=explicit,
            load=tuple(load or ()),
            ensemble=ensemble,
            restrict=tuple(restrict or ()),
            grpc_tls_cert=grpc_tls_cert,
            grpc_tls_key=grpc_tls_key,
            grpc_tls_root=grpc_tls_root,
            http_max_input_size=http_max_input_size,
            log_level=log_level.value,
        )
        arguments = options.arguments(repository)
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
            options=[*arguments, *context.args],
            models=options.models(repository),
            health_headers=options.health_headers,
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
