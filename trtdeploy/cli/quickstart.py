"""``trtdeploy quickstart``."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trtdeploy.cli.console import Bars, Output, door, interrupt, print_json

if TYPE_CHECKING:
    from trtdeploy.quickstart import QuickstartResult

_TITLES = {
    "float": "float",
    "ptq": "PTQ, max",
    "qat": "QAT",
    "onnx": "Q/DQ ONNX",
    "plan": "plan",
    "served": "served, gRPC",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(quickstart)


def quickstart(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything that is written.")] = Path(
        "quickstart"
    ),
    data: Annotated[
        str, typer.Option("--data", help="digits, or a folder or archive of <split>/<class>/*.jpg or *.png.")
    ] = "digits",
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Float checkpoint to start from; skips the float training.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="efficientnet_b0 (default), or module:factory of a torch network.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option("--image-size", min=1, help="Side of the input in pixels (default: 32 for digits, else 64)."),
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Of the float training.")] = None,
    qat_steps: Annotated[int | None, typer.Option("--qat-steps", min=1, help="Of the fine-tuning.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of everything that is drawn at random.")] = 0,
    tritonserver: Annotated[Path | None, typer.Option("--tritonserver", help="The server's executable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Do it all: float -> PTQ -> QAT -> Q/DQ ONNX -> plan -> Triton -> validation, and show what each stage scores."""
    start = time.monotonic()
    signal.signal(signal.SIGTERM, interrupt)
    with door():
        from trtdeploy.quickstart import Display
        from trtdeploy.quickstart import quickstart as run

        console = Console(stderr=True, highlight=False, soft_wrap=True)

        def announce(title: str, command: str) -> None:
            bars.finish()
            console.print(f"\n[bold]{title}[/bold]  [dim]{time.monotonic() - start:.0f} s[/dim]")
            console.print(f"[dim]$ {escape(command)}[/dim]")

        bars = Bars()
        try:
            result = run(
                output,
                Display(step=announce, progress=bars.show),
                data=data,
                checkpoint=checkpoint,
                model=model,
                image_size=image_size,
                epochs=epochs,
                qat_steps=qat_steps,
                seed=seed,
                tritonserver=tritonserver,
            )
        finally:
            bars.finish()
        if as_json:
            stages = {stage: record.model_dump(mode="json") for stage, record in result.stages.items()}
            print_json({"stages": stages, "validation": result.validation.model_dump(mode="json")})
        else:
            _print_result(result, seconds=time.monotonic() - start)


def _print_result(result: QuickstartResult, *, seconds: float) -> None:
    table = Table(
        "stage", "top-1 %, 95% interval", "agreement with float", "latency, batch 1", box=None, pad_edge=False
    )
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for stage, record in result.stages.items():
        agreement = record.agreement_with_float
        table.add_row(
            _TITLES[stage],
            record.top1.format(),
            "-" if agreement is None else f"{agreement:.2f} %",
            "-" if record.latency_ms is None else f"{record.latency_ms:.2f} ms",
        )
    console = Output(soft_wrap=True)
    console.print()
    console.print(table)
    validation = result.validation
    console.print(
        f"\n{validation.n} test images, {validation.throughput_per_s:.0f} per second served; {seconds:.0f} s in all"
    )
    artifacts = result.artifacts
    for title, path in (
        ("ledger", artifacts.ledger),
        ("Q/DQ ONNX", artifacts.onnx),
        ("plan", artifacts.plan),
        ("model repository", artifacts.repository),
        ("server log", artifacts.server_log),
    ):
        console.print(f"  {title:<17} {path}")
