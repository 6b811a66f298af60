"""Handing a plan's bytes to TensorRT, and telling its refusals apart."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from trtdeploy.errors import PlanCorruptError, PlanIncompatibleError, UsageError
from trtdeploy.runtimes.config import LoadOptions
from trtdeploy.runtimes.tensorrt.bindings import Bindings
from trtdeploy.runtimes.tensorrt.plugins import load_plugins

if TYPE_CHECKING:
    import tensorrt

# "TensorRT engine creation is not thread-safe", says Triton's backend, and holds a lock of the process around it, too.
_ONE_AT_A_TIME = threading.Lock()
_OTHER_VERSION = ("version", "Version tag", "expecting library version")
_OTHER_DEVICE = ("incompatible device", "compute capability", "expecting compute")


def deserialize(
    bindings: Bindings, content: bytes, options: LoadOptions
) -> tuple[tensorrt.Runtime, tensorrt.ICudaEngine]:
    """Deserialize a plan; the engine must be destroyed before the runtime.

    Raises:
        UsageError: The plan holds host code, which was not allowed.
        PlanIncompatibleError: It was built for another version or GPU.
        PlanCorruptError: The library cannot read it.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings.trt
    load_plugins(bindings, options.plugins)
    title = f"{bindings.flavour.title} {bindings.version}"
    with _ONE_AT_A_TIME, bindings.messages.capture() as capture:
        runtime = trt.Runtime(bindings.messages.logger)
        runtime.engine_host_code_allowed = options.host_code_allowed
        engine: tensorrt.ICudaEngine | None = runtime.deserialize_cuda_engine(content)
        if engine is not None:
            return runtime, engine
        if capture.mentions("getEngineHostCodeAllowed"):
            raise UsageError(
                "The plan holds host code (it is version-compatible), and that was not allowed.",
                hint="If you have built it yourself: LoadOptions(host_code_allowed=True).",
                log_lines=capture.lines,
            )
        if any(capture.mentions(words) for words in (*_OTHER_VERSION, *_OTHER_DEVICE)):
            raise PlanIncompatibleError(
                f"{title} refuses the plan: it was built for another version or GPU.",
                hint="Build it again on this machine.",
                log_lines=capture.lines,
            )
        raise PlanCorruptError(f"{title} cannot deserialize the plan.", hint="Build it again.", log_lines=capture.lines)
