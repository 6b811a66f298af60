"""``trtdeploy load``."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from trtdeploy.cli.console import Bars, door, interrupt, print_json
from trtdeploy.cli.options.connection import SERVER_URL_HELP, ConnectionFlags, TransportFlags, connected
from trtdeploy.cli.options.groups import with_option_groups
from trtdeploy.cli.options.measurement import MeasurementFlags
from trtdeploy.cli.serving.sweep import LoadCommand
from trtdeploy.errors import GateError

if TYPE_CHECKING:
    from trtdeploy.load import LoadPoint

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
_CAPACITY_CONCURRENCY = 8


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(cls=LoadCommand)(with_option_groups(load))


def load(
    url: Annotated[str, typer.Option("--url", help=SERVER_URL_HELP)],
    model: Annotated[str, typer.Option("--model", help="Model name on the server.")],
    connection: ConnectionFlags,
    transport: TransportFlags,
    measurement: MeasurementFlags,
    version: Annotated[str, typer.Option("--version", help="Version (default: the server's choice).")] = "",
    concurrency: Annotated[
        list[int] | None, typer.Option("--concurrency", min=1, max=512, help="Closed loop; may be repeated.")
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option("--rate", min=0.01, max=1e6, help="Open loop: Poisson requests per second; may be repeated."),
    ] = None,
    slo_p99_ms: Annotated[
        float | None,
        typer.Option("--slo-p99-ms", min=0.001, help="Find the highest rate whose p99 is at most this."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure throughput and latency of a served model under load; exit code 1 if no rate keeps --slo-p99-ms.

    With --sweep it serves copies of a packaged model in many ways, and chooses: trtdeploy load --sweep --help.
    """
    signal.signal(signal.SIGTERM, interrupt)  # what the server was told of has to be taken back
    with door(), Bars() as bars:
        from trtdeploy.load import Arrivals, ClosedLoop, OpenLoop, WindowOptions, measure, search_rate
        from trtdeploy.load.requests import make_requests
        from trtdeploy.load.sending import sending
        from trtdeploy.triton.targets.image_pipeline import served_target

        options, batch_size, seed = measurement.windows(), measurement.batch_size, measurement.seed
        with ExitStack() as stack:
            client = stack.enter_context(connected(url, connection, transport, timeout_s=measurement.timeout))
            target = served_target(client, model, version)
            inputs = make_requests(target, data=measurement.data, batch_size=batch_size, seed=seed)
            send = stack.enter_context(sending(client, target, inputs, version=version))

            def measured(arrivals: Arrivals, label: str, windows: WindowOptions = options) -> LoadPoint:
                return measure(
                    send,
                    arrivals,
                    windows,
                    batch_size=batch_size,
                    totals=target.server_totals,
                    progress=bars.labelled(label),
                )

            levels = concurrency or ([] if rate or slo_p99_ms is not None else [1, 2, 4])
            points = [measured(ClosedLoop(level), f"concurrency {level}") for level in levels]
            points += [measured(OpenLoop(value, seed=seed), f"{value:g} per second") for value in rate or []]
            slo = None
            if slo_p99_ms is not None:
                if max(levels, default=0) < _CAPACITY_CONCURRENCY:  # fewer may not keep the server busy
                    points.append(measured(ClosedLoop(_CAPACITY_CONCURRENCY), "capacity"))
                capacity = max(point.requests_per_s for point in points if point.concurrency is not None)
                slo = search_rate(
                    lambda value, requests: measured(
                        OpenLoop(value, seed=seed), f"{value:.1f} per second", options.for_rate(value, requests)
                    ),
                    p99_ms=slo_p99_ms,
                    capacity_per_s=capacity,
                )
        bars.finish()
        if as_json:
            print_json(
                {
                    "model": model,
                    "version": target.version,
                    "url": url,
                    "batch_size": batch_size,
                    "points": [point.model_dump(mode="json") for point in points],
                    "slo": slo.model_dump(mode="json") if slo is not None else None,
                }
            )
        else:
            for point in [*points, *(slo.tried if slo is not None else ())]:
                typer.echo(_as_text(point))
            for point in slo.confirmations if slo is not None else ():
                typer.echo(f"{_as_text(point)}  (longer)")
            if slo is not None:
                found = f"{slo.best.rate_per_s:.1f} requests/s" if slo.best is not None else "no rate that was tried"
                typer.echo(f"p99 <= {slo.p99_ms:g} ms: {found}")
        if slo is not None and slo.best is None:
            raise typer.Exit(GateError.exit_code)


def _as_text(point: LoadPoint) -> str:
    kind = f"concurrency {point.concurrency}" if point.concurrency is not None else f"rate {point.rate_per_s:.1f}/s"
    latency = ", ".join(f"{name} {value.value:.2f}" for name, value in point.latency_ms.items())
    parts = ", ".join(f"{name} {value:.2f}" for name, value in (point.server_ms or {}).items())
    return (
        f"{kind:<16} {point.samples_per_s:9.1f} samples/s  {latency} ms"
        + (f"  ({parts})" if parts else "")
        + (f"  {point.unsent} never sent" if point.unsent else "")
        + (f"  {point.refused} REFUSED by the queue" if point.refused else "")
        + ("" if point.stable else "  NOT STABLE")
    )
