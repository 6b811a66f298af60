"""The command ``trtdeploy build``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtdeploy.cli.console import Bars, door, print_json
from trtdeploy.cli.plans import AsJson

if TYPE_CHECKING:
    from trtdeploy.plan import Plan

_SHOWN_LAYERS = 5
_PRECISION = "Precision"
_TIMING = "Timing"
_TENSORRT = "TensorRT"
_CPU = "ONNX Runtime"


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(build)


def build(
    model: Annotated[Path, typer.Argument(dir_okay=False, help="An ONNX file.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", dir_okay=False, help="Where the plan goes; its manifest goes to OUTPUT.json."),
    ],
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="auto, onnxruntime, tensorrt or tensorrt-rtx (default: auto).")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", help="NAME=MIN:OPT:MAX, for example input=1x3x224x224:8x3x224x224:32x3x224x224."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Real inputs to check and measure on: .npy / .npz files, a folder of them, or images as in quantize; "
            "without --shape, their sizes are the profile.",
        ),
    ] = None,
    fixed: Annotated[
        list[str] | None,
        typer.Option(
            "--fixed",
            metavar="NAME=FILE|VALUE",
            help="An input that is the same in every run: a .npy file or a number; may be repeated.",
        ),
    ] = None,
    preprocessing: Annotated[
        Path | None,
        typer.Option("--preprocessing", dir_okay=False, help="JSON of resize, crop, mean, std, ... for images."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", dir_okay=False, help="YAML file of build options; flags win over it.")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", dir_okay=False, help="Accuracy ledger to summarise in the manifest.")
    ] = None,
    isolate: Annotated[
        bool | None, typer.Option("--isolate", help="Build in a process of its own, which may crash alone.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", rich_help_panel=_PRECISION, help="auto, or explicit: demand INT8 Q/DQ."),
    ] = None,
    ranges: Annotated[
        Path | None,
        typer.Option(
            "--ranges",
            dir_okay=False,
            rich_help_panel=_PRECISION,
            help="Dynamic ranges per tensor, JSON or a TensorRT calibration cache; they become Q/DQ in the model.",
        ),
    ] = None,
    implicit: Annotated[
        bool | None,
        typer.Option("--implicit", rich_help_panel=_PRECISION, help="Hand the ranges to TensorRT <= 10 as such."),
    ] = None,
    high_precision: Annotated[
        str | None,
        typer.Option(
            "--high-precision",
            rich_help_panel=_PRECISION,
            help="fp32, fp16 or bf16: the type of what is not quantized.",
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            "--timing-cache",
            rich_help_panel=_TIMING,
            help="File that keeps measured timings between builds, or a folder with one per machine.",
        ),
    ] = None,
    timing_cache_mode: Annotated[
        str | None,
        typer.Option(
            "--timing-cache-mode",
            rich_help_panel=_TIMING,
            help="update; read-only; or verify: fail where a timing is missing (default: update).",
        ),
    ] = None,
    timing_iterations: Annotated[
        int | None,
        typer.Option("--timing-iterations", min=1, rich_help_panel=_TENSORRT, help="How often each tactic is timed."),
    ] = None,
    timing_rounds: Annotated[
        int | None,
        typer.Option(
            "--timing-rounds", min=1, rich_help_panel=_CPU, help="How often each candidate is timed (default: 20)."
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, rich_help_panel=_CPU, help="Threads of one inference (default: measured)."),
    ] = None,
    workspace_mib: Annotated[
        int | None,
        typer.Option("--workspace-mib", min=1, rich_help_panel=_TENSORRT, help="Scratch memory that a kernel may use."),
    ] = None,
    optimization_level: Annotated[
        int | None,
        typer.Option(
            "--optimization-level", min=0, max=5, rich_help_panel=_TENSORRT, help="0, fast build, to 5, fast plan."
        ),
    ] = None,
    auxiliary_streams: Annotated[
        int | None,
        typer.Option("--auxiliary-streams", min=0, rich_help_panel=_TENSORRT, help="Streams beside the plan's own."),
    ] = None,
    hardware_compatibility: Annotated[
        str | None,
        typer.Option(
            "--hardware-compatibility", rich_help_panel=_TENSORRT, help="none, ampere+ or same-compute-capability."
        ),
    ] = None,
    version_compatible: Annotated[
        bool | None,
        typer.Option("--version-compatible", rich_help_panel=_TENSORRT, help="Let later versions load the plan."),
    ] = None,
    exclude_lean_runtime: Annotated[
        bool | None,
        typer.Option("--exclude-lean-runtime", rich_help_panel=_TENSORRT, help="Leave the lean runtime out of it."),
    ] = None,
    refit: Annotated[
        str | None,
        typer.Option("--refit", rich_help_panel=_TENSORRT, help="Replaceable weights: all, identical, individual."),
    ] = None,
    strip_weights: Annotated[
        bool | None, typer.Option("--strip-weights", rich_help_panel=_TENSORRT, help="Leave the weights out.")
    ] = None,
    weight_streaming: Annotated[
        bool | None,
        typer.Option("--weight-streaming", rich_help_panel=_TENSORRT, help="Let weights stay in host memory."),
    ] = None,
    sparsity: Annotated[
        bool | None,
        typer.Option("--sparsity", rich_help_panel=_TENSORRT, help="Look for kernels for 2:4 sparse weights."),
    ] = None,
    tf32: Annotated[
        bool | None, typer.Option("--tf32/--no-tf32", rich_help_panel=_TENSORRT, help="TF32 in float layers.")
    ] = None,
    plugin: Annotated[
        list[Path] | None,
        typer.Option("--plugin", dir_okay=False, rich_help_panel=_TENSORRT, help="Plugin library to load (trusted!)."),
    ] = None,
    profiling_verbosity: Annotated[
        str | None,
        typer.Option("--profiling-verbosity", rich_help_panel=_TENSORRT, help="detailed, layer-names or none."),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            "--compute-capability", rich_help_panel=_TENSORRT, help="Target of TensorRT-RTX, as 8.9; or current."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Build a plan: measure every candidate on this machine, keep the fastest that gives the same answers."""
    with door(), Bars() as bars:
        from trtdeploy.building.build import BuildConfig, InputSource
        from trtdeploy.building.build import build as run_build
        from trtdeploy.data.preprocessing import Preprocessing
        from trtdeploy.files import keep_inputs
        from trtdeploy.tensors import parse_shape_option

        keep_inputs(output, config)
        base = BuildConfig.from_yaml(config) if config else BuildConfig()
        given: dict[str, Any] = {
            "runtime": runtime,
            "profiles": (dict(map(parse_shape_option, shape)),) if shape else None,
            "isolate": isolate,
            "precision": precision,
            "ranges": ranges,
            "implicit": implicit,
            "high_precision": high_precision,
            "timing_cache": timing_cache,
            "timing_cache_mode": timing_cache_mode,
            "timing_iterations": timing_iterations,
            "timing_rounds": timing_rounds,
            "threads": threads,
            "workspace_bytes": None if workspace_mib is None else workspace_mib << 20,
            "optimization_level": optimization_level,
            "auxiliary_streams": auxiliary_streams,
            "hardware_compatibility": hardware_compatibility,
            "version_compatible": version_compatible,
            "exclude_lean_runtime": exclude_lean_runtime,
            "refit": refit,
            "strip_weights": strip_weights,
            "weight_streaming": weight_streaming,
            "sparsity": sparsity,
            "tf32": tf32,
            "plugins": tuple(plugin) if plugin else None,
            "profiling_verbosity": profiling_verbosity,
            "compute_capabilities": tuple(compute_capability) if compute_capability else None,
        }
        values = {name: getattr(base, name) for name in BuildConfig.model_fields}
        values |= {name: value for name, value in given.items() if value is not None}
        inputs = InputSource(
            data=data,
            fixed=tuple(fixed or ()),
            preprocessing=Preprocessing.read(preprocessing) if preprocessing else None,
        )
        plan = run_build(model, output, BuildConfig(**values), inputs=inputs, ledger=ledger, progress=bars.show)
        bars.finish()
        if as_json:
            print_json({"plan": str(plan.path), **plan.manifest.model_dump(mode="json")})
        else:
            _show(plan)


def _show(plan: Plan) -> None:
    from trtdeploy.tensors import format_shape

    manifest = plan.manifest
    typer.echo(f"{plan.path}: {manifest.runtime.name} {manifest.runtime.version}, {manifest.plan_bytes / 1e6:.1f} MB")
    if manifest.device.kind == "gpu":
        typer.echo(f"  for {manifest.device.name}, compute capability {manifest.device.capability}")
        for ranges in manifest.ranges:
            typer.echo("  profile " + ", ".join(f"{name}={covered}" for name, covered in ranges.items()))
    precision = manifest.precision
    if precision.asked_for or manifest.device.kind == "gpu":
        typer.echo(f"  {precision.shares}" if precision.shares else "  no layers with constant weights")
        typer.echo(f"  {precision.note}")
    fallbacks = list(precision.fallbacks.items())
    for name, reason in fallbacks[:_SHOWN_LAYERS]:
        typer.echo(f"  {name} was asked for in {precision.layers[name].asked_for}: {reason}")
    if len(fallbacks) > _SHOWN_LAYERS:
        typer.echo(f"  and {len(fallbacks) - _SHOWN_LAYERS} more: trtdeploy inspect {plan.path} --layers")
    in_float = [(name, layer.left_float) for name, layer in precision.layers.items() if layer.left_float]
    for name, reason in in_float[:_SHOWN_LAYERS]:
        typer.echo(f"  {name} stays in float: {reason}")
    if len(in_float) > _SHOWN_LAYERS:
        typer.echo(f"  and {len(in_float) - _SHOWN_LAYERS} more: trtdeploy inspect {plan.path} --layers")
    if manifest.tactic is not None:
        origin = "timing cache" if manifest.tactic.cached else "measured now"
        for name, milliseconds in sorted(manifest.tactic.milliseconds.items(), key=lambda item: item[1]):
            typer.echo(f"  {milliseconds:8.2f} ms  {name}")
        for name, reason in manifest.tactic.rejected.items():
            typer.echo(f"  {'-':>8}     {name}: {reason}")
        typer.echo(f"  chosen: {manifest.tactic.name}, {manifest.tactic.threads} thread(s); {origin}")
        shapes = ", ".join(f"{name} {format_shape(shape)}" for name, shape in manifest.tactic.shapes.items())
        typer.echo(f"  on {shapes}: {manifest.tactic.inputs}")
