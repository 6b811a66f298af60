"""CUDA's runtime API with every call checked.

The module ``cuda.bindings.runtime`` is injected, so that the tests can put a driver of their own in its place.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from trtdeploy.errors import CudaError, DeviceMemoryError, RuntimeUnavailableError

_OUT_OF_MEMORY = "cudaErrorMemoryAllocation"
_INSTALL = "pip install 'trtdeploy[tensorrt]', or 'trtdeploy[rtx]'"


class CudaApi:
    """Calls functions of ``cuda.bindings.runtime``; each returns an error code first.

    Args:
        runtime: The module.
    """

    def __init__(self, runtime: ModuleType | Any) -> None:
        self.runtime = runtime

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function and return what it returns after the error code: nothing, a value or a tuple.

        Raises:
            DeviceMemoryError: There is not enough memory on the device, or not enough that can be pinned.
            CudaError: Any other error, by name and description.
        """
        error, *values = getattr(self.runtime, function)(*arguments)
        if int(error) != 0:
            raise self._error(function, error)
        if not values:
            return None
        return values[0] if len(values) == 1 else tuple(values)

    def clear_last_error(self) -> None:
        """Forget an error that has been dealt with; the next call would report it again."""
        self.runtime.cudaGetLastError()

    def device_count(self) -> int:
        """Return the number of GPUs."""
        return int(self.call("cudaGetDeviceCount"))

    @property
    def driver_version(self) -> str:
        """The newest CUDA that the driver supports, as "13.0"."""
        return _dotted(int(self.call("cudaDriverGetVersion")))

    @property
    def cuda_version(self) -> str:
        """CUDA of the runtime library, as "13.0"."""
        return _dotted(int(self.call("cudaRuntimeGetVersion")))

    def _error(self, function: str, error: Any) -> CudaError:
        # both return (error code, bytes)
        name = _text(self.runtime.cudaGetErrorName(error))
        description = _text(self.runtime.cudaGetErrorString(error))
        message = f"{function} failed: {name}: {description}."
        if name == _OUT_OF_MEMORY:
            return DeviceMemoryError(
                message, hint="Use fewer contexts, smaller profiles or batches, or activations='shared'."
            )
        return CudaError(message)


def load_api() -> CudaApi:
    """Return the API of this machine.

    Raises:
        RuntimeUnavailableError: cuda-python is not installed, there is no driver, it is too old, or there is no GPU.
    """
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"cuda-python is not installed: {error}.", hint=f"Install it: {_INSTALL}"
        ) from error
    api = CudaApi(runtime)
    try:
        count = api.device_count()
    except CudaError as error:
        if "cudaErrorInsufficientDriver" in error.message:
            raise _no_driver_for(api) from error
        if "cudaErrorNoDevice" in error.message:
            count = 0
        else:
            raise RuntimeUnavailableError(
                f"CUDA cannot be used: {error.message}", hint="See: trtdeploy doctor"
            ) from error
    except RuntimeError as error:  # cuda-python found no library to load
        raise RuntimeUnavailableError(f"CUDA cannot be loaded: {error}.", hint="See: trtdeploy doctor") from error
    if count == 0:
        raise RuntimeUnavailableError(
            "There is an NVIDIA driver but no GPU that may be used.",
            hint="Look at CUDA_VISIBLE_DEVICES and nvidia-smi.",
        )
    return api


def _no_driver_for(api: CudaApi) -> RuntimeUnavailableError:
    """CUDA gives one error for no driver at all and for one that is too old; the driver's version tells them apart."""
    supported = api.driver_version
    if supported == "0.0":
        return RuntimeUnavailableError(
            "There is no NVIDIA driver on this machine.",
            hint="Install one (nvidia-smi then shows it), or run this on a machine with a GPU.",
        )
    return RuntimeUnavailableError(
        f"The NVIDIA driver supports CUDA {supported} at most; the installed cuda-python is for {api.cuda_version}.",
        hint="Install a newer driver, or an older one of: pip install 'cuda-python<="
        + supported.split(".")[0]
        + ".99'",
    )


def _dotted(version: int) -> str:
    """Return "13.0" for 13000: https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART____VERSION.html."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _text(answer: tuple[Any, bytes]) -> str:
    return answer[1].decode(errors="replace")
