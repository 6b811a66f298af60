"""Building a plan with ONNX Runtime: optimize in several ways, keep what is right, measure, take the fastest."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime

from trtdeploy.errors import BuildError, InferenceError, ModelError, TimingCacheError, TrtDeployError, UsageError
from trtdeploy.onnxgraph.macs import relative_work
from trtdeploy.onnxgraph.qdq.layers import asked_types, count_quantized
from trtdeploy.onnxgraph.qdq.quantized_types import INT8, quantizes_input
from trtdeploy.onnxgraph.reading.source import SourceModel
from trtdeploy.plan import DeviceFacts, LayerPrecision, PrecisionFacts, TacticFacts
from trtdeploy.runtimes.base import BuildProgress, BuiltPlan
from trtdeploy.runtimes.config import BuildConfig
from trtdeploy.runtimes.onnxruntime.building.blocked_layout import uses_blocked_layout
from trtdeploy.runtimes.onnxruntime.building.integer_kernels import INTEGER_KERNELS, inexact_kernels
from trtdeploy.runtimes.onnxruntime.building.measure import median_milliseconds, relative_error
from trtdeploy.runtimes.onnxruntime.building.tactics import tactics_for
from trtdeploy.runtimes.onnxruntime.cpu import instruction_sets, processor_name, usable_cores
from trtdeploy.runtimes.onnxruntime.session import RUNTIME_ERRORS, first_line, make_session
from trtdeploy.runtimes.onnxruntime.witness import Witness
from trtdeploy.runtimes.trial_inputs import RealInputs, TrialInputs, trial_inputs
from trtdeploy.tensors import Array
from trtdeploy.timing_cache import TimingCache
from trtdeploy.version import __version__

logger = logging.getLogger(__name__)

# A tactic may round an activation to the neighbouring code where float arithmetic in another order lands on the other
# side of a rounding boundary; that moves outputs by well below this share of their norm. A wrong graph moves them more.
MAX_RELATIVE_ERROR = 0.05

_EXACT_EVERYWHERE = frozenset({("uint8", "uint8"), ("int8", "int8")})
_PACKED_WEIGHTS = "MatMulNBits"
"""Multiplies a float input by weights that stay codes of 4 or 8 bits."""


@dataclass(frozen=True)
class _Candidate:
    """An optimized model that gives the right answers, and how many threads to run it with."""

    tactic: str
    threads: int
    content: bytes

    @property
    def key(self) -> str:
        return f"{self.tactic}, {self.threads} thread" + ("s" if self.threads > 1 else "")


def build_plan(
    source: SourceModel,
    config: BuildConfig,
    *,
    real: RealInputs | None = None,
    cache: TimingCache | None = None,
    progress: BuildProgress | None = None,
) -> BuiltPlan:
    """Compile a model; see ``Runtime.build``."""
    count = count_quantized(source.proto)
    _check_profiles(source, config)
    best_served = {name: shapes.opt for profile in config.profiles[:1] for name, shapes in profile.items()}
    trial = trial_inputs(source.proto, source.inputs, best_served, real)
    inputs = trial.arrays
    compiled, rejected = _compile(source, trial, quantized=count.pairs > 0, progress=progress)
    thread_counts = [config.threads] if config.threads else sorted({1, usable_cores()})
    candidates = [_Candidate(name, threads, content) for name, content in compiled.items() for threads in thread_counts]
    milliseconds, cached = _timings(source, candidates, inputs, config, cache=cache, progress=progress)
    best = min(candidates, key=lambda candidate: milliseconds[candidate.key])
    logger.info("fastest of %d candidates: %s, %.2f ms", len(candidates), best.key, milliseconds[best.key])
    optimized = onnx.load_model_from_string(best.content)
    # the block size is one of this processor's, and so is that sums of products do not saturate
    bound = uses_blocked_layout(optimized) or bool(inexact_kernels(optimized, _EXACT_EVERYWHERE))
    return BuiltPlan(
        content=best.content,
        device=DeviceFacts(
            kind="cpu",
            name=processor_name(),
            capability=instruction_sets() if bound else instruction_sets().split("+")[0],
        ),
        precision=_precision(source, inputs, optimized),
        tactic=TacticFacts(
            name=best.tactic,
            threads=best.threads,
            milliseconds={key: round(value, 4) for key, value in milliseconds.items()},
            rejected=rejected,
            cached=cached,
            shapes=trial.shapes,
            inputs=trial.origin,
        ),
        profiles=config.profiles,
    )


def _check_profiles(source: SourceModel, config: BuildConfig) -> None:
    known = {spec.name: spec for spec in source.inputs}
    for profile in config.profiles:
        for name, shapes in profile.items():
            if name not in known:
                raise UsageError(f"--shape names input {name!r}; the model has {sorted(known)}.")
            if not shapes.fits(known[name].shape):
                raise UsageError(f"--shape {name}={shapes} does not fit the model's input {known[name]}.")


def _compile(
    source: SourceModel, trial: TrialInputs, *, quantized: bool, progress: BuildProgress | None
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Optimize the model in every way; keep what gives the model's own answers on the trial's inputs."""
    tactics = tactics_for(quantized)
    inputs = trial.arrays
    try:
        witness = Witness(source.proto)
    except ModelError as error:
        title = f"ONNX Runtime {onnxruntime.__version__}"
        raise ModelError(
            f"{title} cannot run {source.path}: {error.message}",
            hint=error.hint or "An opset too old or too new is converted by onnx.version_converter.",
        ) from error
    try:
        reference = witness(inputs)
    except InferenceError as error:
        raise _cannot_run(source, trial, error.message) from error
    _require_numbers(source, trial, reference)
    if trial.assumed:
        logger.warning("measured and checked with open sizes at 1 (%s). %s", trial, trial.remedy)
    compiled: dict[str, bytes] = {}
    rejected: dict[str, str] = {}
    for done, tactic in enumerate(tactics):
        if progress:
            progress("optimizing", done, len(tactics))
        try:
            content = tactic.compile(source.proto)
            if content is None:
                rejected[tactic.name] = "changes nothing for this model"
                continue
            session = make_session(content)
            inexact = inexact_kernels(onnx.load_model_from_string(content))
            if inexact:
                rejected[tactic.name] = f"this processor does not sum up exactly: {_counted(inexact)}"
                continue
            difference = relative_error(session.run(None, inputs), reference)
        except RUNTIME_ERRORS as failure:
            rejected[tactic.name] = first_line(failure)
            continue
        if difference > MAX_RELATIVE_ERROR:
            rejected[tactic.name] = f"outputs differ by {difference:.1%} from the model as exported"
        else:
            compiled[tactic.name] = content
    if progress:
        progress("optimizing", len(tactics), len(tactics))
    if not compiled:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
        raise BuildError(f"No tactic gives the right answers for {source.path}: {reasons}.")
    return compiled, rejected


def _require_numbers(source: SourceModel, trial: TrialInputs, outputs: Sequence[Array]) -> None:
    """Refuse a model whose answers no plan could be compared with."""
    for spec, values in zip(source.outputs, outputs, strict=True):
        if values.dtype.kind != "f" or not values.size:
            continue
        undefined = int(np.isnan(values).sum())
        if undefined or not np.isfinite(values).any():
            what = f"{undefined} of {values.size} values are NaN" if undefined else "all values are infinite"
            raise ModelError(
                f"{source.path} gives no numbers to compare a plan with: {what} in its output {spec.name!r}.",
                hint=f"Did its training diverge, or are its inputs others than {trial.origin}? {trial.remedy}.",
            )


def _cannot_run(source: SourceModel, trial: TrialInputs, reason: str) -> TrtDeployError:
    """Return the error that says what to give; it is the model's own only where its sizes are those of its user."""
    title = f"ONNX Runtime {onnxruntime.__version__}"
    if trial.assumed:
        return UsageError(
            f"{source.path} does not say the sizes of its inputs, and {title} cannot run it with open ones at 1 "
            f"({trial}): {reason}",
            hint=trial.remedy,
        )
    return ModelError(f"{title} cannot run {source.path} on {trial} ({trial.origin}): {reason}", hint=trial.remedy)


def _timings(
    source: SourceModel,
    candidates: list[_Candidate],
    inputs: dict[str, Array],
    config: BuildConfig,
    *,
    cache: TimingCache | None,
    progress: BuildProgress | None,
) -> tuple[dict[str, float], bool]:
    """Return the median milliseconds of every candidate, from the cache where it has all of them."""
    shapes = ",".join(f"{name}={'x'.join(map(str, array.shape))}" for name, array in inputs.items())
    software = f"trtdeploy {__version__}, onnxruntime {onnxruntime.__version__}"
    machine = f"{software}|{processor_name()}|{instruction_sets()}|{usable_cores()} cores"
    keys = {candidate.key: f"{machine}|{source.sha256}|{shapes}|{candidate.key}" for candidate in candidates}
    known = cache.read() if cache else {}
    if all(key in known for key in keys.values()):
        return {name: known[key] for name, key in keys.items()}, True
    if cache and cache.mode == "verify":
        missing = [name for name, key in keys.items() if key not in known]
        raise TimingCacheError(
            f"The timing cache {cache.path} lacks {len(missing)} of {len(keys)} timings ({missing[0]}), and mode "
            "'verify' forbids to measure them.",
            hint="Build once with --timing-cache-mode update, on this machine and version.",
        )
    # Timings of different runs are not comparable on a machine whose speed drifts: measure all anew.
    sessions = {candidate.key: make_session(candidate.content, threads=candidate.threads) for candidate in candidates}
    measured = median_milliseconds(
        sessions,
        inputs,
        rounds=config.timing_rounds,
        progress=(lambda done, total: progress("timing", done, total)) if progress else None,
    )
    if cache:
        cache.merge({keys[name]: value for name, value in measured.items()})
    return measured, False


def _precision(source: SourceModel, inputs: dict[str, Array], optimized: onnx.ModelProto) -> PrecisionFacts:
    asked = asked_types(source.proto)
    macs = relative_work(source.proto, {name: array.shape for name, array in inputs.items()})
    kernels = [node.op_type for node in optimized.graph.node if node.op_type in INTEGER_KERNELS]
    types = sorted({kind for kind in asked.values() if kind})
    if not any(node.op_type == "DequantizeLinear" for node in source.proto.graph.node):
        note = "The model has no Q/DQ: everything runs in float."
    elif kernels:
        note = f"Integer kernels: {_counted(kernels)}."
    elif types and INT8 not in types:
        note = f"Values are rounded to codes ({', '.join(types)}); the arithmetic on this CPU is float."
    else:
        note = "Values are rounded to INT8 codes; the arithmetic on this CPU is float, which was measured as faster."
    by_name = {node.name: node.op_type for node in optimized.graph.node}
    integer = bool(kernels) or _PACKED_WEIGHTS in by_name.values()
    layers = {
        name: LayerPrecision(
            macs=work,
            quantized=quantizes_input(asked[name]),
            asked_for=asked[name],
            runs_in=_runs_in(by_name.get(name), asked[name]) if integer else "float",
        )
        for name, work in macs.items()
    }
    return PrecisionFacts.of(layers, evidence="optimized graph", integer_kernels=len(kernels), note=note)


def _runs_in(kernel: str | None, asked: str | None) -> str | None:
    """Return what the optimized graph shows of a layer: some optimizations give a layer another name, then nothing."""
    if kernel is None:
        return None
    if kernel in INTEGER_KERNELS:
        return INT8
    return asked if kernel == _PACKED_WEIGHTS else "float"


def _counted(kinds: Iterable[str]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in sorted(Counter(kinds).items()))
