"""ONNX Runtime as a runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnxruntime

from trtdeploy.errors import PlanCorruptError, PlanIncompatibleError, UsageError
from trtdeploy.plan import DeviceFacts, Manifest, RuntimeFacts, manifest_of_unknown_plan
from trtdeploy.runtimes.base import BuildProgress, BuiltPlan, LoadedEngine, Runtime
from trtdeploy.runtimes.config import BuildConfig, LoadOptions
from trtdeploy.runtimes.onnxruntime.cpu import instruction_sets, processor_name
from trtdeploy.runtimes.onnxruntime.engine import OnnxRuntimeEngine
from trtdeploy.runtimes.onnxruntime.session import RUNTIME_ERRORS, Session, first_line, make_session, tensor_spec
from trtdeploy.timing_cache import TimingCache

if TYPE_CHECKING:
    from trtdeploy.onnxgraph.reading.source import SourceModel
    from trtdeploy.runtimes.trial_inputs import RealInputs


class OnnxRuntime(Runtime):
    """The embedded runtime, on any CPU."""

    name = "onnxruntime"

    @property
    def version(self) -> str:
        return str(onnxruntime.__version__)

    def build(
        self,
        source: SourceModel,
        config: BuildConfig,
        *,
        real: RealInputs | None = None,
        progress: BuildProgress | None = None,
    ) -> BuiltPlan:
        # onnx is needed to build, not to load: services start faster without it
        from trtdeploy.runtimes.onnxruntime.building.builder import build_plan

        config.refuse_options_of("tensorrt", runtime="ONNX Runtime")
        cache = None
        if config.timing_cache is not None:
            cache = TimingCache(config.timing_cache, mode=config.timing_cache_mode)
            cache.read()  # what is no cache is refused before anything is measured
        return build_plan(source, config, real=real, cache=cache, progress=progress)

    def describe(self, content: bytes, options: LoadOptions) -> Manifest:
        session = self._session(content, threads=1)
        return manifest_of_unknown_plan(
            content,
            runtime=RuntimeFacts(name="onnxruntime", version=self.version),
            device=DeviceFacts(kind="cpu", name=processor_name(), capability=instruction_sets()),
            inputs=tuple(map(tensor_spec, session.get_inputs())),
            outputs=tuple(map(tensor_spec, session.get_outputs())),
        )

    def check(self, manifest: Manifest, options: LoadOptions) -> None:
        hint = f"Build it again on this machine from {manifest.onnx.file}: trtdeploy build {manifest.onnx.file} -o PLAN"
        if manifest.runtime.version != self.version:
            raise PlanIncompatibleError(
                f"The plan was built with ONNX Runtime {manifest.runtime.version}; {self.version} is installed, and "
                "optimized graphs are not portable between versions.",
                hint=hint,
            )
        here = instruction_sets()
        if manifest.device.kind != "cpu" or manifest.device.capability not in (here, here.split("+")[0]):
            raise PlanIncompatibleError(
                f"The plan was built for {manifest.device.name} ({manifest.device.capability}); this machine is "
                f"{processor_name()} ({here}), where its memory layout differs.",
                hint=hint,
            )

    def load(self, content: bytes, manifest: Manifest, options: LoadOptions) -> LoadedEngine:
        foreign = options.model_dump(exclude_defaults=True, exclude={"threads"})
        if foreign:
            raise UsageError(
                f"The plan runs on the CPU, by ONNX Runtime; {', '.join(sorted(foreign))} are options of a GPU plan.",
                hint="Leave them out.",
            )
        threads = options.threads
        if threads is None:
            threads = manifest.tactic.threads if manifest.tactic else 1
        session = self._session(content, threads=threads)
        return OnnxRuntimeEngine(session, manifest.outputs, plan_bytes=len(content))

    def _session(self, content: bytes, *, threads: int) -> Session:
        try:
            return make_session(content, threads=threads)
        except RUNTIME_ERRORS as error:
            raise PlanCorruptError(
                f"ONNX Runtime {self.version} cannot load the plan: {first_line(error)}", hint="Build it again."
            ) from error
