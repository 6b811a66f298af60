"""From an ONNX file to a plan with its manifest."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from trtdeploy.building.child_process import build_in_child
from trtdeploy.building.model_precision import with_precision
from trtdeploy.building.real_inputs import InputSource, read_inputs
from trtdeploy.errors import BuildError, UsageError
from trtdeploy.files import keep_inputs, same_file, sha256_bytes
from trtdeploy.ledger import Ledger
from trtdeploy.onnxgraph.qdq.layers import left_in_float
from trtdeploy.onnxgraph.reading.finite_weights import require_finite_weights
from trtdeploy.onnxgraph.reading.source import SourceModel, keep_model, load_source
from trtdeploy.plan import (
    Manifest,
    Plan,
    PrecisionFacts,
    RuntimeFacts,
    SourceFacts,
    is_manifest,
    manifest_path,
    write_plan,
)
from trtdeploy.runtimes import get_runtime
from trtdeploy.runtimes.base import BuildProgress
from trtdeploy.runtimes.config import BuildConfig
from trtdeploy.timing_cache.sidecar import sidecar_path
from trtdeploy.version import __version__

__all__ = ["BuildConfig", "InputSource", "build"]


def build(
    model: str | Path,
    output: str | Path,
    config: BuildConfig | None = None,
    *,
    inputs: InputSource | None = None,
    ledger: str | Path | None = None,
    progress: BuildProgress | None = None,
) -> Plan:
    """Build a plan and write it with its manifest; on any error both files are as they were.

    Args:
        model: An ONNX file.
        output: Where the plan goes; the manifest goes to ``<output>.json``.
        config: Options; the defaults if None.
        inputs: Real inputs to check and measure on, and to take profiles from where the config has none; without them
            numbers are drawn, with open sizes at 1 where no profile says more.
        ledger: An accuracy ledger whose summary the manifest shall carry.
        progress: Called with (phase, steps done, steps in all).

    Raises:
        ModelError: ``model`` is not a valid ONNX model, its weights or answers are no numbers, or the runtime refuses
            it.
        BuildError: The runtime could build nothing that gives the model's answers, or the plan cannot be written.
        RuntimeUnavailableError: The runtime that the config asks for is not on this machine.
        DataError: The real inputs cannot be read or do not fit the model.
        UsageError: The config does not fit the model; sizes or values of inputs have to be given; or plan, manifest or
            timing cache would replace another file.
        TimingCacheError: The timing cache cannot be locked or written, or is something else.
    """
    config, inputs = config or BuildConfig(), inputs or InputSource()
    _keep_files(output, config, model, ledger)
    if config.isolate:
        where = None if ledger is None else Path(ledger)
        return build_in_child(Path(model), Path(output), config, inputs=inputs, ledger=where, progress=progress)
    runtime = get_runtime(config.runtime)
    source = load_source(model)
    require_finite_weights(source.proto, str(source.path))
    summary = Ledger(ledger).summary() if ledger is not None else None
    real = read_inputs(inputs, source, config.profiles)
    asking = with_precision(source, config)
    built = runtime.build(asking, config, real=real, progress=progress)
    manifest = Manifest(
        trtdeploy_version=__version__,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        runtime=RuntimeFacts.model_validate({"name": runtime.name, "version": runtime.version}),
        device=built.device,
        inputs=source.inputs,
        outputs=source.outputs,
        profiles=built.profiles,
        profile_values=built.profile_values,
        precision=_explained(built.precision, asking, config),
        tactic=built.tactic,
        plan_bytes=len(built.content),
        plan_sha256=sha256_bytes(built.content),
        onnx=SourceFacts(file=source.path.name, sha256=source.sha256),
        build_config=config.model_dump(mode="json", exclude_defaults=True),
        preprocessing=source.preprocessing,
        labels=source.labels,
        calibration=source.calibration,
        ledger=summary,
    )
    try:
        return write_plan(output, built.content, manifest)
    except OSError as error:
        raise BuildError(f"The plan {output} cannot be written: {error}.") from error


def _keep_files(output: str | Path, config: BuildConfig, model: str | Path, ledger: str | Path | None) -> None:
    """Refuse a build that would write over what it reads, over its own other files, or over a file beside the plan."""
    manifest = manifest_path(output)
    written = {"plan": Path(output), "manifest": manifest}
    for what, path in written.items():
        keep_model(path, model, what)
        keep_inputs(path, ledger, config.ranges, *config.plugins, what=what)
    if manifest.is_file() and not is_manifest(manifest.read_bytes()):
        raise UsageError(
            f"The plan's manifest would replace {manifest}, which is no manifest.",
            hint=f"Choose another name for the plan than {output}, or move that file away.",
        )
    if config.timing_cache is None or config.timing_cache.is_dir():
        return
    for cache in (config.timing_cache, sidecar_path(config.timing_cache)):
        keep_model(cache, model, "timing cache")
        keep_inputs(cache, ledger, config.ranges, *config.plugins, what="timing cache")
        for what, path in written.items():
            if same_file(cache, path):
                raise UsageError(
                    f"The {what} and the timing cache cannot both be {path}.", hint="Give one of them another name."
                )


def _explained(precision: PrecisionFacts, source: SourceModel, config: BuildConfig) -> PrecisionFacts:
    """Return the facts with the reason why each layer is in float, unless all are meant to be."""
    if config.implicit:
        return precision.explained(dict.fromkeys(precision.layers, "its input has no dynamic range"))
    has_pairs = any(node.op_type == "DequantizeLinear" for node in source.proto.graph.node)
    return precision.explained(left_in_float(source.proto) if has_pairs else {})
