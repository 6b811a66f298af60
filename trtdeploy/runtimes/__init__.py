"""The runtimes that build and execute plans, behind one contract (``base``)."""

from __future__ import annotations

from trtdeploy.errors import UsageError
from trtdeploy.runtimes.base import Runtime


def get_runtime(name: str) -> Runtime:
    """Return a runtime by name; ``auto`` takes the best one that builds and runs plans on this machine.

    Raises:
        RuntimeUnavailableError: Its library is not installed.
        UsageError: There is no runtime of this name.
    """
    if name == "auto":
        name = _best_here()
    if name == "onnxruntime":
        from trtdeploy.runtimes.onnxruntime.runtime import OnnxRuntime

        return OnnxRuntime()
    if name in ("tensorrt", "tensorrt-rtx"):
        from trtdeploy.runtimes.tensorrt.runtime import TensorRTRuntime

        return TensorRTRuntime.find(name)
    raise UsageError(f"There is no runtime {name!r}.", hint="Choose auto, onnxruntime, tensorrt or tensorrt-rtx.")


def _best_here() -> str:
    """Prefer a TensorRT whose plans can run here: that needs the library and a GPU which it supports."""
    from trtdeploy.runtimes.tensorrt.runtime import TensorRTRuntime

    for name in ("tensorrt", "tensorrt-rtx"):
        if TensorRTRuntime.runs_here(name):
            return name
    return "onnxruntime"
