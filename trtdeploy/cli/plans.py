"""``trtdeploy inspect``, ``run`` and ``bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from trtdeploy.cli.console import Output, door, finite_seconds, print_json

PlanPath = Annotated[Path, typer.Argument(dir_okay=False, help="A plan; its manifest PLAN.json must lie beside it.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Threads of one inference on a CPU (default: what the build chose)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("inspect")(inspect_command)
    app.command()(run)
    app.command()(bench)


def inspect_command(
    path: Annotated[Path, typer.Argument(dir_okay=False, help="An ONNX file or a plan.")],
    layers: Annotated[
        bool,
        typer.Option("--layers", help="List every layer with weights and what it runs in, as far as that is known."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show inputs and outputs, profiles, precision, kernels and provenance."""
    with door():
        from trtdeploy.building.inspection import inspect_file
        from trtdeploy.tensors import TensorSpec

        facts = inspect_file(path)
        if as_json:
            print_json(facts)
            return
        precision = facts.get("precision") or {}
        listed = precision.pop("layers", {})
        in_float = {name: layer["left_float"] for name, layer in listed.items() if layer["left_float"]}
        reasons = {**in_float, **precision.get("fallbacks", {}), **precision.get("unknown", {})}
        for kind in ("fallbacks", "unknown"):
            if precision.get(kind):
                precision[kind] = f"{len(precision[kind])} of {len(listed)} layers; --layers says which and why"
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in facts.items():
            if value in (None, [], {}):
                continue
            if name in ("inputs", "outputs"):
                value = "\n".join(str(TensorSpec.model_validate(spec)) for spec in value)
            table.add_row(name, _readable(value))
        console = Output(soft_wrap=True)
        console.print(table)
        if layers and listed:
            console.print(_layer_table(listed, reasons))


def run(
    plan: PlanPath,
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            "-i",
            help="NAME=FILE.npy, NAME=random, or NAME=IMAGE.jpg where the plan knows its preprocessing.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", dir_okay=False, help="Write the outputs to this .npz file.")
    ] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Run a plan once."""
    with door():
        from trtdeploy.engine.run_once import run_once, summarize

        outputs, manifest = run_once(plan, inputs, output=output, threads=threads)
        facts = summarize(outputs, manifest)
        if as_json:
            print_json(facts)
            return
        for name, fact in facts.items():
            typer.echo(f"{name} {fact['dtype']}{fact['shape']}  min {fact['min']:.4g}  max {fact['max']:.4g}")
            for row in fact.get("top", []):
                typer.echo("  " + ", ".join(f"{entry['label']} {entry['probability']:.1%}" for entry in row))


def bench(
    plan: PlanPath,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", help="Batch size; give several to sweep (default: 1).")
    ] = None,
    contexts: Annotated[
        list[int] | None, typer.Option("--contexts", help="Inferences at a time; give several to sweep (default: 1).")
    ] = None,
    threads: Threads = None,
    warm_up: Annotated[
        float, typer.Option("--warm-up", min=0, callback=finite_seconds, help="Seconds before counting, per point.")
    ] = 0.5,
    duration: Annotated[
        float, typer.Option("--duration", min=0.001, callback=finite_seconds, help="Seconds that count, per point.")
    ] = 3.0,
    as_json: AsJson = False,
) -> None:
    """Measure latency percentiles and throughput of a plan on this machine."""
    with door():
        from trtdeploy.engine.benchmark import bench as run_bench

        console = Console(stderr=True)
        with console.status("measuring") as status:
            points = run_bench(
                plan,
                batches=batch or [1],
                contexts=contexts or [1],
                threads=threads,
                warm_up_s=warm_up,
                duration_s=duration,
                progress=lambda point: status.update(f"measuring {point}"),
            )
        if as_json:
            print_json([point.model_dump() for point in points])
            return
        table = Table(
            "batch", "contexts", "samples/s", "p50 ms", "p90 ms", "p95 ms", "p99 ms", "n", box=None, pad_edge=False
        )
        for point in points:
            latencies = [point.latency_ms[name].format() for name in ("p50", "p90", "p95", "p99")]
            table.add_row(
                str(point.batch),
                str(point.contexts),
                f"{point.throughput_per_s:.1f}",
                *latencies,
                str(point.inferences),
            )
        Output().print(table)


def _layer_table(layers: dict[str, dict[str, Any]], reasons: dict[str, str]) -> Table:
    total = sum(layer["macs"] for layer in layers.values()) or 1
    columns = ["layer", "MACs", "share", "asked for", "runs in", "why"]
    table = Table(*(columns if reasons else columns[:-1]), box=None, pad_edge=False)
    for name, layer in layers.items():
        share = f"{100 * layer['macs'] / total:.1f}%"
        row = [name, f"{layer['macs']:,}", share, layer["asked_for"] or "float", layer["runs_in"] or "not known"]
        table.add_row(*row, *([reasons.get(name)] if reasons else []))
    return table


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_on_one_line(entry)}" for key, entry in value.items() if entry not in (None, {}, []))
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def _on_one_line(entry: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in entry.items()) if isinstance(entry, dict) else str(entry)
