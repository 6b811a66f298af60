"""Arrays on a GPU: what other libraries hand in, read where it lies.

Two protocols are in use: ``__cuda_array_interface__`` version 3
(https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html) and DLPack
(https://dmlc.github.io/dlpack/latest/python_spec.html).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from trtdeploy.cuda.device import Device
from trtdeploy.cuda.streams import Stream
from trtdeploy.errors import DtypeError

_KDL_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_DLPACK_KINDS = {0: "int", 1: "uint", 2: "float", 6: "bool"}
_UNREGISTERED = 0  # cudaMemoryTypeUnregistered
_CAPSULE_NAME = b"dltensor"


class DeviceArray:
    """A contiguous array in a GPU's memory that somebody else owns.

    Attributes:
        address: Where it begins.
        shape: Its shape.
        dtype: Numpy's data type.
        owner: Keeps the memory alive.
        producer: Handle of the stream whose work so far writes it; None if it is ready.
    """

    def __init__(
        self, address: int, shape: Sequence[int], dtype: np.dtype[Any], owner: object, *, producer: int | None = None
    ) -> None:
        self.address = address
        self.shape = tuple(shape)
        self.dtype = dtype
        self.owner = owner
        self.producer = producer

    @property
    def nbytes(self) -> int:
        """Its length in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """Its rank."""
        return len(self.shape)


def import_device_array(name: str, value: Any, device: Device, stream: Stream) -> DeviceArray | None:
    """Return a view of a GPU array; None for anything that does not lie on a GPU.

    Args:
        name: What a message calls it.
        value: An object with ``__cuda_array_interface__`` or with DLPack.
        device: Where it has to lie.
        stream: Made to wait for the work that still writes the array, as far as its owner says which.

    Raises:
        DtypeError: It lies on another GPU, is not contiguous, or has a type that numpy has not.
    """
    # DLPack first: PyTorch has both, and its interface does not say which stream still writes the tensor
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        kind, ordinal = value.__dlpack_device__()
        if int(kind) not in _KDL_CUDA:
            return None
        if int(ordinal) != device.ordinal:
            raise DtypeError(
                f"Input {name!r} lies on GPU {int(ordinal)}; this engine runs on GPU {device.ordinal}.",
                hint="Copy it there first.",
            )
        with device.use():  # PyTorch gives no tensor of a device that is not current
            return _from_dlpack(name, value, stream)
    if hasattr(value, "__cuda_array_interface__"):
        with device.use():
            return _from_interface(name, value, device, stream)
    return None


def _from_interface(name: str, value: Any, device: Device, stream: Stream) -> DeviceArray:
    interface = value.__cuda_array_interface__
    shape = tuple(interface["shape"])
    dtype = np.dtype(interface["typestr"])
    if interface.get("mask") is not None:
        raise DtypeError(f"Input {name!r} is a masked array; an engine knows no masks.", hint="Fill in its gaps first.")
    _require_contiguous(name, shape, interface.get("strides"), dtype.itemsize)
    address = int(interface["data"][0])
    attributes = device.api.call("cudaPointerGetAttributes", address) if address else None
    if attributes is not None and int(attributes.type) == _UNREGISTERED:
        raise DtypeError(f"Input {name!r} names {address:#x} as its address, which is no memory that CUDA knows.")
    if attributes is not None and int(attributes.device) != device.ordinal:
        raise DtypeError(
            f"Input {name!r} lies on GPU {attributes.device}; this engine runs on GPU {device.ordinal}.",
            hint="Copy it there first.",
        )
    # 0 is not allowed there; 1 and 2 name the default streams, as CUDA itself does
    producer = interface.get("stream")
    if producer is None:
        return DeviceArray(address, shape, dtype, value)
    # now and in this thread: the number may mean the default stream of the calling thread, and it may not live long
    stream.wait_for_stream(int(producer))
    return DeviceArray(address, shape, dtype, value, producer=stream.handle)


def _require_contiguous(name: str, shape: Sequence[int], strides: Sequence[int] | None, itemsize: int) -> None:
    if strides is None or 0 in shape:
        return
    expected = itemsize
    for size, stride in zip(reversed(shape), reversed(tuple(strides)), strict=True):
        if size > 1 and stride != expected:
            raise DtypeError(f"Input {name!r} is not contiguous.", hint="Make it so: array.contiguous() or similar.")
        expected *= size


class DLDevice(ctypes.Structure):
    """Where a tensor lies."""

    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class DLDataType(ctypes.Structure):
    """Its type."""

    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class DLTensor(ctypes.Structure):
    """DLPack's description of a tensor: https://dmlc.github.io/dlpack/latest/c_api.html."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _from_dlpack(name: str, value: Any, stream: Stream) -> DeviceArray:
    try:
        # the producer makes our stream wait for its own
        capsule = value.__dlpack__(stream=stream.handle)
    except (RuntimeError, TypeError, ValueError, BufferError) as error:
        raise DtypeError(f"Input {name!r} cannot be read through DLPack: {error}.") from error
    array = read_capsule(name, capsule)
    array.producer = stream.handle
    return array


def read_capsule(name: str, capsule: Any) -> DeviceArray:
    """Read an unversioned DLPack capsule. It is not consumed: it frees the array when it is dropped itself.

    Raises:
        DtypeError: The array is not contiguous, or has a type that numpy has not.
    """
    tensor = tensor_of(capsule)
    dtype = _numpy_dtype(tensor.dtype)
    if dtype is None:
        kind = f"code {tensor.dtype.code}, {tensor.dtype.bits} bits"
        raise DtypeError(
            f"Input {name!r} has a DLPack type that numpy has not: {kind}.",
            hint="Convert it first; an engine takes what engine.inputs says.",
        )
    shape = tuple(tensor.shape[index] for index in range(tensor.ndim))
    strides = None
    if tensor.strides:
        strides = [tensor.strides[index] * dtype.itemsize for index in range(tensor.ndim)]
    _require_contiguous(name, shape, strides, dtype.itemsize)
    return DeviceArray(int(tensor.data or 0) + int(tensor.byte_offset), shape, dtype, capsule)


def tensor_of(capsule: Any) -> DLTensor:
    """Return the description that an unversioned DLPack capsule holds; it lives as long as the capsule."""
    # an own prototype: to set argtypes on ctypes.pythonapi would change it for everybody
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    pointer = prototype(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, _CAPSULE_NAME)
    return ctypes.cast(pointer, ctypes.POINTER(DLTensor)).contents


def _numpy_dtype(kind: DLDataType) -> np.dtype[Any] | None:
    name = _DLPACK_KINDS.get(kind.code)
    if name is None or kind.lanes != 1:
        return None
    try:
        return np.dtype("bool" if name == "bool" else f"{name}{kind.bits}")
    except TypeError:  # 4-bit integers, 8-bit floats
        return None
