"""Bringing a caller's objects to numpy arrays without copying what need not be copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trtdeploy.errors import DtypeError
from trtdeploy.tensors import Array

_DLPACK_CPU_DEVICES = (1, 3)  # kDLCPU, kDLCUDAHost: https://dmlc.github.io/dlpack/latest/c_api.html


def as_arrays(inputs: Mapping[str, Any], import_array: Callable[[str, Any], Any]) -> dict[str, Array]:
    """Return numpy views of what lies in host memory; what lies on the engine's device becomes a device array.

    Args:
        inputs: Numpy, anything with DLPack, or with ``__cuda_array_interface__``.
        import_array: Called with name and value of what is no numpy array; returns a device array, or None for what
            does not lie on the engine's device.

    Raises:
        DtypeError: An input is no array, or lies on a device that this engine does not run on.
    """
    if not isinstance(inputs, Mapping):
        raise DtypeError(
            f"Inputs must be a dict of arrays by name, got {type(inputs).__name__}.",
            hint='Call infer({"input": array}); engine.inputs lists the names.',
        )
    arrays: dict[str, Array] = {}
    for name, value in inputs.items():
        imported = None if isinstance(value, np.ndarray) else import_array(name, value)
        arrays[name] = _as_host_array(name, value) if imported is None else imported
    return arrays


def _as_host_array(name: str, value: Any) -> Array:
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, np.generic):
        return np.asarray(value)
    if hasattr(value, "__dlpack__"):
        try:
            device = value.__dlpack_device__()[0]
        except (RuntimeError, TypeError, ValueError, BufferError, AttributeError) as error:
            raise DtypeError(f"Input {name!r} cannot be read through DLPack: {error}.") from error
        if int(device) not in _DLPACK_CPU_DEVICES:
            raise DtypeError(
                f"Input {name!r} lies on a device (DLPack type {int(device)}); this engine runs on the CPU.",
                hint="Copy it to host memory first.",
            )
        try:
            return np.from_dlpack(value)
        except (RuntimeError, TypeError, ValueError, BufferError) as error:
            raise DtypeError(f"Input {name!r} cannot be read through DLPack: {error}.") from error
    if hasattr(value, "__cuda_array_interface__"):
        raise DtypeError(
            f"Input {name!r} lies on a CUDA device; this engine runs on the CPU.", hint="Copy it to host memory first."
        )
    raise DtypeError(
        f"Input {name!r} is a {type(value).__name__}; an array is needed: numpy, or anything with DLPack.",
        hint="numpy.asarray(value, dtype=...) makes one.",
    )
