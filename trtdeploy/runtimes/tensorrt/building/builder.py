"""Building a plan with TensorRT."""

from __future__ import annotations

import logging
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtdeploy.errors import BuildError, PlanError, RuntimeUnavailableError, TimingCacheError
from trtdeploy.onnxgraph.graph import control_flow
from trtdeploy.onnxgraph.lint.quantization_check import require_quantization
from trtdeploy.onnxgraph.macs import relative_work
from trtdeploy.onnxgraph.qdq.layers import asked_types
from trtdeploy.plan import DeviceFacts, PrecisionFacts
from trtdeploy.runtimes.base import BuildProgress, BuiltPlan
from trtdeploy.runtimes.config import BuildConfig, LoadOptions
from trtdeploy.runtimes.tensorrt.bindings import Bindings
from trtdeploy.runtimes.tensorrt.building.implicit import set_dynamic_ranges
from trtdeploy.runtimes.tensorrt.building.network import ParsedNetwork, parse
from trtdeploy.runtimes.tensorrt.building.options import apply_options
from trtdeploy.runtimes.tensorrt.building.profiles import Profiles, add_profiles, profiles_for, split_values
from trtdeploy.runtimes.tensorrt.building.progress import Cancellation, make_monitor, run_cancellable
from trtdeploy.runtimes.tensorrt.building.timing import TimingBlobs
from trtdeploy.runtimes.tensorrt.messages import Capture
from trtdeploy.runtimes.tensorrt.plugins import load_plugins
from trtdeploy.runtimes.tensorrt.precision.kernel_list import facts_from_kernels
from trtdeploy.runtimes.tensorrt.precision.precision import ask_plan, facts_from_network, require_int8
from trtdeploy.runtimes.tensorrt.precision.weighted_layers import WeightedLayers
from trtdeploy.timing_cache import BlobCache

if TYPE_CHECKING:
    import tensorrt

    from trtdeploy.onnxgraph.reading.source import SourceModel
    from trtdeploy.runtimes.trial_inputs import RealInputs

logger = logging.getLogger(__name__)

# TensorRT's builder is not safe for several threads of one process: concurrent builds with a warm timing cache crash.
_ONE_BUILD_PER_PROCESS = threading.Lock()
# "Adding new entry to timing cache is not allowed if `BuilderFlag::kERROR_ON_TIMING_CACHE_MISS` is set." is what the
# library says (TensorRT-RTX 1.7); other versions may say it otherwise, but not in one line about what is "missing".
_TIMING_CACHE_MISS = re.compile(r"timing cache.*miss(?![a-z])", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Target:
    """What the plan is for.

    Attributes:
        device: For the manifest.
        obstacle: Why the finished plan cannot be loaded here to be asked; None where it can.
        cache: Timing cache of this machine, version and device, if there is one.
    """

    device: DeviceFacts
    obstacle: str | None
    cache: BlobCache | None


def build_plan(
    bindings: Bindings,
    source: SourceModel,
    config: BuildConfig,
    target: Target,
    *,
    real: RealInputs | None = None,
    progress: BuildProgress | None,
) -> BuiltPlan:
    """Compile a model; see ``Runtime.build``. Ctrl-C cancels the build."""
    cancellation = Cancellation()

    def work() -> BuiltPlan:
        with _ONE_BUILD_PER_PROCESS:
            return _build(bindings, source, config, target, real, progress, cancellation)

    return run_cancellable(work, cancellation)


def _build(
    bindings: Bindings,
    source: SourceModel,
    config: BuildConfig,
    target: Target,
    real: RealInputs | None,
    progress: BuildProgress | None,
    cancellation: Cancellation,
) -> BuiltPlan:
    load_plugins(bindings, config.plugins)
    require_quantization(source.proto)
    parsed = parse(bindings, source, strongly_typed=not config.implicit)
    network = parsed.network
    builder_config = parsed.builder.create_builder_config()
    apply_options(bindings, config, builder_config)
    ranges = profiles_for(network, config, real)
    add_profiles(parsed.builder, network, builder_config, ranges)
    profiles, profile_values = split_values(network, ranges)
    layers = _weighted_layers(source, profiles)
    if config.implicit:
        layers = set_dynamic_ranges(bindings, network, builder_config, config, layers)
    from_network = facts_from_network(network, layers, why=target.obstacle or "it could not be inspected.")
    if not config.implicit:
        require_int8(from_network, model=str(source.path))
    monitor = make_monitor(bindings.trt, progress, cancellation)
    builder_config.progress_monitor = monitor
    with bindings.messages.capture() as capture:
        blobs = TimingBlobs(bindings)
        timing = _attach_timing_cache(bindings, builder_config, config, target, blobs)
        content = _compile(
            bindings, parsed, builder_config, config, monitor, cancellation, capture, source, target.obstacle
        )
        if timing is not None and target.cache is not None:
            target.cache.merge(bytes(timing.serialize()), blobs.combining(target.cache), blobs.entries)
    precision = _shown(bindings, content, layers, target) or from_network
    if precision.evidence == "engine inspector":
        require_int8(precision, model=str(source.path))
    return BuiltPlan(
        content=content,
        device=target.device,
        precision=precision,
        tactic=None,
        profiles=profiles,
        profile_values=profile_values,
    )


def _compile(
    bindings: Bindings,
    parsed: ParsedNetwork,
    builder_config: tensorrt.IBuilderConfig,
    config: BuildConfig,
    monitor: tensorrt.IProgressMonitor,
    cancellation: Cancellation,
    capture: Capture,
    source: SourceModel,
    obstacle: str | None,
) -> bytes:
    title = f"{bindings.flavour.title} {bindings.version}"
    try:
        serialized: tensorrt.IHostMemory | None = parsed.builder.build_serialized_network(
            parsed.network, builder_config
        )
    except (RuntimeError, MemoryError) as error:
        raise BuildError(f"{title} failed on {source.path}: {error}.", log_lines=capture.lines) from error
    failure = getattr(monitor, "failure", None)
    if failure is not None:
        raise failure
    if serialized is None:
        if cancellation.wanted:
            raise BuildError(f"The build of {source.path} was cancelled.")
        if config.timing_cache_mode == "verify" and any(map(_TIMING_CACHE_MISS.search, capture.lines)):
            raise TimingCacheError(
                f"{title} would have to time a tactic that the timing cache lacks, and mode 'verify' forbids it.",
                hint="Build once with --timing-cache-mode update, on this machine and version.",
                log_lines=capture.errors,
            )
        if obstacle is not None and capture.mentions("CUDA_SUCCESS"):
            raise RuntimeUnavailableError(
                f"{title} needs a GPU to build {source.path} with these options. {obstacle}",
                hint="Of the options, refit (all, identical) and strip-weights are known to need one; or build there.",
                log_lines=capture.errors,
            )
        raise BuildError(
            f"{title} could not build {source.path}: {capture.errors[-1] if capture.errors else 'it gives no reason'}",
            hint="A kernel found too little scratch memory: raise or leave out --workspace-mib, or lower the batch."
            if capture.mentions("OutOfMemory") or capture.mentions("workspace")
            else f"{_control_flow(source)}Try other --shape ranges or fewer options; more is in the log below.",
            log_lines=capture.lines,
        )
    return bytes(serialized)


def _control_flow(source: SourceModel) -> str:
    """Return advice on branches and loops, on which builders fail by an assertion of their own; empty without such."""
    nodes = control_flow(source.proto)
    if not nodes:
        return ""
    return (
        f"The model has branches or loops ({', '.join(nodes[:3])}), which not every builder takes: export the one case "
        "that is served, or build with --runtime onnxruntime. "
    )


def _attach_timing_cache(
    bindings: Bindings,
    builder_config: tensorrt.IBuilderConfig,
    config: BuildConfig,
    target: Target,
    blobs: TimingBlobs,
) -> tensorrt.ITimingCache | None:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings.trt
    if target.cache is None:
        return None
    blob = target.cache.load(blobs.entries)
    timing = blobs.open(builder_config, blob)
    # TensorRT compares the devices' UUIDs, and those of two boards of one model differ: the sidecar knows better
    if not builder_config.set_timing_cache(timing, ignore_mismatch=target.cache.vouches_for(blob)):
        target.cache.refuse("TensorRT finds that it comes from another device or version")
        timing = blobs.open(builder_config, b"")
        if not builder_config.set_timing_cache(timing, ignore_mismatch=False):
            raise TimingCacheError("TensorRT refuses an empty timing cache that it has just made.")
    if config.timing_cache_mode == "verify":
        if not hasattr(trt.BuilderFlag, "EDITABLE_TIMING_CACHE") or not hasattr(
            trt.BuilderFlag, "ERROR_ON_TIMING_CACHE_MISS"
        ):
            raise TimingCacheError(
                f"TensorRT {bindings.version} cannot verify a timing cache: that came with 10.8.",
                hint="Use --timing-cache-mode read-only.",
            )
        builder_config.set_flag(trt.BuilderFlag.EDITABLE_TIMING_CACHE)
        builder_config.set_flag(trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)
        builder_config.set_flag(trt.BuilderFlag.DISABLE_COMPILATION_CACHE)
    return timing


def _weighted_layers(source: SourceModel, profiles: Profiles) -> WeightedLayers:
    """Count at the best served shapes; where shapes cannot be inferred, every layer counts alike."""
    shapes = {spec.name: [1 if size < 0 else size for size in spec.shape] for spec in source.inputs}
    shapes |= {name: list(ranges.opt) for profile in profiles[:1] for name, ranges in profile.items()}
    return WeightedLayers.asking(relative_work(source.proto, shapes), asked_types(source.proto))


def _shown(bindings: Bindings, content: bytes, layers: WeightedLayers, target: Target) -> PrecisionFacts | None:
    """Return what the plan is shown to run in: by its engine, or, where that cannot be loaded, by its kernels."""
    why = target.obstacle
    if why is None:
        try:
            # this process has just built it: its host code, if it is version-compatible, is our own
            return ask_plan(bindings, content, layers, LoadOptions(host_code_allowed=True))
        except PlanError as error:
            why = error.message
    return facts_from_kernels(content, layers, why=f"The engine could not be inspected: {why}")
