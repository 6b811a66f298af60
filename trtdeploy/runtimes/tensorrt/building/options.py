"""From ``BuildConfig`` to TensorRT's builder config; what this version lacks is refused with the reason."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from trtdeploy.errors import RuntimeUnavailableError, UsageError
from trtdeploy.runtimes.config import BuildConfig
from trtdeploy.runtimes.tensorrt.bindings import Bindings

if TYPE_CHECKING:
    import tensorrt


def apply_options(bindings: Bindings, config: BuildConfig, target: tensorrt.IBuilderConfig) -> None:
    """Set every option that was asked for.

    Raises:
        UsageError: This version cannot honour an option.
    """
    _apply_flags(bindings, config, target)
    _apply_numbers(config, target, bindings)
    _apply_verbosity(bindings, config, target)
    if config.hardware_compatibility != "none":
        _apply_hardware_compatibility(bindings, config, target)
    if config.compute_capabilities:
        _apply_compute_capabilities(bindings, config, target)


def refused(bindings: Bindings, option: str, reason: str) -> UsageError:
    """Return the error of an option that this library cannot honour."""
    return UsageError(
        f"{bindings.flavour.title} {bindings.version} has no {option}: {reason}", hint="Leave the option out."
    )


def _apply_flags(bindings: Bindings, config: BuildConfig, target: tensorrt.IBuilderConfig) -> None:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings.trt
    if not config.tf32:
        target.clear_flag(trt.BuilderFlag.TF32)
    if config.sparsity:
        target.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if config.weight_streaming:
        target.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if config.strip_weights:
        target.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if config.refit != "none":
        kind = {
            "all": trt.BuilderFlag.REFIT,
            "identical": trt.BuilderFlag.REFIT_IDENTICAL,
            "individual": trt.BuilderFlag.REFIT_INDIVIDUAL,
        }[config.refit]
        target.set_flag(kind)
    if config.version_compatible:
        if bindings.flavour.name == "tensorrt-rtx":
            raise refused(bindings, "version compatibility", "its plans are bound to the release that built them.")
        target.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if config.exclude_lean_runtime:
            target.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)


def _apply_numbers(config: BuildConfig, target: tensorrt.IBuilderConfig, bindings: Bindings) -> None:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings.trt
    if config.workspace_bytes is not None:
        target.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_bytes)
    if config.optimization_level is not None:
        target.builder_optimization_level = config.optimization_level
    if config.timing_iterations is not None:
        target.avg_timing_iterations = config.timing_iterations
    if config.auxiliary_streams is not None:
        target.max_aux_streams = config.auxiliary_streams


def _apply_verbosity(bindings: Bindings, config: BuildConfig, target: tensorrt.IBuilderConfig) -> None:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings.trt
    target.profiling_verbosity = {
        "detailed": trt.ProfilingVerbosity.DETAILED,
        "layer-names": trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
        "none": trt.ProfilingVerbosity.NONE,
    }[config.profiling_verbosity]


def _apply_hardware_compatibility(bindings: Bindings, config: BuildConfig, target: tensorrt.IBuilderConfig) -> None:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings.trt
    if bindings.flavour.name == "tensorrt-rtx":
        raise refused(bindings, "hardware compatibility levels", "choose its targets by --compute-capability instead.")
    if config.hardware_compatibility == "ampere+":
        target.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        return
    if not hasattr(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY"):
        raise refused(bindings, "level same-compute-capability", "it came with TensorRT 10.9.")
    target.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY


def _apply_compute_capabilities(bindings: Bindings, config: BuildConfig, target: tensorrt.IBuilderConfig) -> None:
    if not hasattr(target, "set_compute_capability") or not hasattr(target, "num_compute_capabilities"):
        raise refused(
            bindings,
            "choice of compute capabilities",
            "it builds for the GPU of this machine; see --hardware-compatibility.",
        )
    wanted = list(dict.fromkeys(config.compute_capabilities))
    if "current" in wanted and len(wanted) > 1:
        raise UsageError("--compute-capability current excludes others: it builds for the GPU of this machine alone.")
    known = known_compute_capabilities(bindings)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UsageError(
            f"{bindings.flavour.title} {bindings.version} cannot build for compute capability {', '.join(unknown)}.",
            hint=f"It knows {', '.join(known)}.",
        )
    target.num_compute_capabilities = len(wanted)
    for index, name in enumerate(wanted):
        if not target.set_compute_capability(known[name], index):
            raise RuntimeUnavailableError(
                f"{bindings.flavour.title} {bindings.version} cannot build for compute capability {name} here.",
                hint="'current' needs a GPU; name the capability instead." if name == "current" else None,
            )


def known_compute_capabilities(bindings: Bindings) -> dict[str, Any]:
    """Return the targets of a TensorRT-RTX by their usual names: "8.9" for SM89, and "current"."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings.trt
    if not hasattr(trt, "ComputeCapability"):
        return {}
    known: dict[str, Any] = {}
    for name, member in trt.ComputeCapability.__members__.items():
        if match := re.fullmatch(r"SM(\d+)(\d)", name):
            known[f"{match[1]}.{match[2]}"] = member
        elif name == "CURRENT":
            known["current"] = member
    return known
