"""TensorRT and TensorRT-RTX as runtimes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trtdeploy.errors import PlanIncompatibleError, RuntimeUnavailableError, UsageError
from trtdeploy.plan import DeviceFacts, Manifest, PrecisionFacts
from trtdeploy.runtimes.base import BuildProgress, BuiltPlan, LoadedEngine, Runtime
from trtdeploy.runtimes.config import BuildConfig, LoadOptions
from trtdeploy.runtimes.tensorrt.bindings import Bindings, load_bindings

if TYPE_CHECKING:
    from trtdeploy.cuda.device import Device
    from trtdeploy.onnxgraph.reading.source import SourceModel
    from trtdeploy.runtimes.trial_inputs import RealInputs

# What TensorRT-RTX builds for unless told otherwise, and "later":
# https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html
RTX_TARGETS = ("8.0", "8.6", "8.9", "12.0+")


class TensorRTRuntime(Runtime):
    """A library with TensorRT's API, on NVIDIA GPUs."""

    def __init__(self, bindings: Bindings) -> None:
        self.bindings = bindings
        self.name = bindings.flavour.name

    @classmethod
    def find(cls, name: str) -> TensorRTRuntime:
        """Return the runtime of this name.

        Raises:
            RuntimeUnavailableError: Its library is not installed or cannot be loaded.
        """
        return cls(load_bindings(name))

    @classmethod
    def runs_here(cls, name: str) -> bool:
        """Say whether the library is installed and this machine has a GPU that its plans run on."""
        try:
            bindings = load_bindings(name)
            device = _device(0)
        except RuntimeUnavailableError:
            return False
        return name != "tensorrt-rtx" or is_target(device.capability, ",".join(_targets(bindings)))

    @property
    def version(self) -> str:
        return self.bindings.version

    @property
    def title(self) -> str:
        """Name and version, for messages."""
        return f"{self.bindings.flavour.title} {self.version}"

    def build(
        self,
        source: SourceModel,
        config: BuildConfig,
        *,
        real: RealInputs | None = None,
        progress: BuildProgress | None = None,
    ) -> BuiltPlan:
        # onnx is needed to build, not to load
        from trtdeploy.onnxgraph.graph import with_named_nodes
        from trtdeploy.runtimes.tensorrt.building.builder import Target, build_plan
        from trtdeploy.runtimes.tensorrt.precision.kernel_list import lowest_target
        from trtdeploy.runtimes.tensorrt.stores import timing_cache_of

        config.refuse_options_of("onnxruntime", runtime=self.bindings.flavour.title)
        try:
            device: Device | None = _device(0)
            reason = ""
        except RuntimeUnavailableError as error:
            if not self.bindings.flavour.builds_without_gpu or config.compute_capabilities == ("current",):
                raise RuntimeUnavailableError(
                    f"{self.title} needs a GPU to build this plan: {error.message}", hint=error.hint
                ) from error
            device, reason = None, error.message
        if config.timing_cache is not None and self.name == "tensorrt-rtx":
            raise UsageError(
                "TensorRT-RTX has no timing cache: its kernels are compiled on the GPU that runs them.",
                hint="Leave out --timing-cache; LoadOptions.runtime_cache keeps the compiled kernels.",
            )
        built_for = self._built_for(config, device)
        if device is not None and not is_target(device.capability, built_for.capability):
            reason = f"the plan is for compute capability {built_for.capability}, this GPU has {device.capability}."
        cache = None if device is None else timing_cache_of(self.bindings, device, config)
        target = Target(device=built_for, obstacle=reason or None, cache=cache)
        named = replace(source, proto=with_named_nodes(source.proto))
        built = build_plan(self.bindings, named, config, target, real=real, progress=progress)
        lowest = None if config.compute_capabilities else lowest_target(built.content)
        if lowest is None or self.name != "tensorrt-rtx":
            return built
        # a type such as FP8 takes the earlier ones of the default targets away
        targets = ",".join(each for each in RTX_TARGETS if _numbers(each) >= _numbers(lowest))
        return replace(built, device=built.device.model_copy(update={"capability": targets}))

    def precision_of(self, content: bytes, manifest: Manifest, options: LoadOptions) -> PrecisionFacts:
        from trtdeploy.runtimes.tensorrt.precision.precision import ask_plan
        from trtdeploy.runtimes.tensorrt.precision.weighted_layers import WeightedLayers

        if manifest.precision.evidence == "engine inspector" or not manifest.precision.layers:
            return manifest.precision
        # built where there was no GPU to ask, looked at where there is one
        with _device(options.device).use():
            return ask_plan(self.bindings, content, WeightedLayers.of(manifest.precision), options)

    def describe(self, content: bytes, options: LoadOptions) -> Manifest:
        from trtdeploy.runtimes.tensorrt.execution.description import describe_plan

        return describe_plan(self.bindings, content, options, _device(options.device))

    def check(self, manifest: Manifest, options: LoadOptions) -> None:
        again = f"trtdeploy build {manifest.onnx.file} -o PLAN --runtime {self.name}"
        if not self._same_version(manifest):
            raise PlanIncompatibleError(
                f"The plan was built with {self.bindings.flavour.title} {manifest.runtime.version}; {self.version} is "
                "installed, and plans are bound to the exact version.",
                hint=f"Install that version, or build again: {again}",
            )
        try:
            device = _device(options.device)
        except RuntimeUnavailableError as error:
            raise RuntimeUnavailableError(
                f"The plan runs on a GPU, by {self.title}: {error.message}",
                hint=error.hint or "Run it on a machine with a GPU, or build for ONNX Runtime.",
            ) from error
        if not is_target(device.capability, manifest.device.capability):
            raise PlanIncompatibleError(
                f"The plan was built for compute capability {manifest.device.capability} ({manifest.device.name}); "
                f"this GPU, {device.name}, has {device.capability}.",
                hint=f"Build it again on this machine: {again}",
            )

    def load(self, content: bytes, manifest: Manifest, options: LoadOptions) -> LoadedEngine:
        from trtdeploy.runtimes.tensorrt.execution.engine import TensorRTEngine

        if options.threads is not None:
            raise UsageError("The plan runs on a GPU: threads= means nothing to it.", hint="Leave it out.")
        return TensorRTEngine(self.bindings, content, options, _device(options.device))

    def _built_for(self, config: BuildConfig, device: Device | None) -> DeviceFacts:
        if self.name == "tensorrt-rtx" and config.compute_capabilities != ("current",):
            targets = config.compute_capabilities or _targets(self.bindings)
            return DeviceFacts(kind="gpu", name="any GPU of these capabilities", capability=",".join(targets))
        if device is None:
            raise RuntimeUnavailableError(f"{self.title} needs a GPU to build this plan.")
        capability = {
            "none": device.capability,
            "same-compute-capability": device.capability,
            "ampere+": "8.0+",
        }[config.hardware_compatibility]
        return DeviceFacts(kind="gpu", name=device.name, capability=capability)

    def _same_version(self, manifest: Manifest) -> bool:
        if manifest.runtime.version == self.version:
            return True
        if not manifest.build_config.get("version_compatible"):
            return False
        built = tuple(int(part) for part in manifest.runtime.version.split(".") if part.isdigit())
        return built <= self.bindings.release


def _device(ordinal: int) -> Device:
    from trtdeploy.cuda.api import load_api
    from trtdeploy.cuda.device import Device

    api = load_api()
    count = api.device_count()
    if ordinal >= count:
        raise RuntimeUnavailableError(f"GPU {ordinal} was asked for; this machine has {count}.")
    return Device(api, ordinal)


def _targets(bindings: Bindings) -> tuple[str, ...]:
    return RTX_TARGETS if bindings.flavour.name == "tensorrt-rtx" else ()


def is_target(capability: str, targets: str) -> bool:
    """Say whether "8.9" is in "8.0,8.9,12.0+", where a plus takes in everything later."""
    here = _numbers(capability)
    for target in filter(None, targets.split(",")):
        wanted = _numbers(target)
        if here == wanted or (target.endswith("+") and here >= wanted):
            return True
    return False


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.rstrip("+").split(".")))
