"""The runtimes that build and execute plans, behind one contract (``base``)."""

from __future__ import annotations

from trtdeploy.errors import RuntimeUnavailableError
from trtdeploy.runtimes.base import Runtime


def get_runtime(name: str) -> Runtime:
    """Return a runtime by name; ``auto`` takes the best one that this machine has.

    Raises:
        RuntimeUnavailableError: Its library is not installed, or this version of trtdeploy cannot drive it.
    """
    if name in ("auto", "onnxruntime"):
        from trtdeploy.runtimes.onnxruntime.runtime import OnnxRuntime

        return OnnxRuntime()
    raise RuntimeUnavailableError(
        f"The runtime {name!r} cannot be used by this version of trtdeploy.", hint="Use --runtime onnxruntime."
    )
