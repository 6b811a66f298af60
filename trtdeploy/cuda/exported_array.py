"""Arrays on a GPU that are given out: other libraries read them where they lie, through either protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trtdeploy.cuda.arrays import DeviceArray, tensor_of
from trtdeploy.cuda.device import Device
from trtdeploy.cuda.memory import PinnedBuffer, array_over, copy_to_host
from trtdeploy.cuda.streams import ExternalStream, Stream
from trtdeploy.tensors import Array

_KDL_CUDA = 2
_KDL_BOOL = 6
_LEGACY_STREAM = 1  # what DLPack means by stream=None
_NO_SYNCHRONIZATION = -1


class ExportedArray(DeviceArray):
    """A contiguous array on a GPU for CuPy, Numba, PyTorch or JAX to read without a copy.

    Args:
        address: Where it begins.
        shape: Its shape.
        dtype: Numpy's data type.
        owner: Keeps the memory alive; this array, and whoever has taken it through DLPack, hold it.
        device: The GPU.
        producer: Handle of the stream whose work so far writes it; None if it is ready.
    """

    def __init__(
        self,
        address: int,
        shape: Sequence[int],
        dtype: np.dtype[Any],
        owner: object,
        *,
        device: Device,
        producer: int | None = None,
    ) -> None:
        super().__init__(address, shape, dtype, owner, producer=producer)
        self._device = device

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3; its reader waits for the stream that it names."""
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            # an empty array has no address: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
            "data": (self.address if self.nbytes else 0, False),
            "strides": None,
            "stream": self.producer,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return DLPack's (device type, number)."""
        return _KDL_CUDA, self._device.ordinal

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Return an unversioned capsule, which readers of every version take.

        Args:
            stream: The reader's stream, made to wait for the array; -1 if it sees to that itself.
            max_version: The newest version that the reader knows.
            dl_device: Where the reader wants it: only where it lies.
            copy: Whether the reader wants a copy: it gets none.

        Raises:
            BufferError: A copy, or another device, is asked for.
            ValueError: The stream is 0, which DLPack leaves without a meaning for CUDA.
        """
        if copy or (dl_device is not None and tuple(map(int, dl_device)) != self.__dlpack_device__()):
            raise BufferError("The array can only be read where it lies; numpy() copies it to the host.")
        if stream == 0:
            raise ValueError("Stream 0 has no meaning in DLPack; CUDA's default streams are 1 and 2.")
        if self.producer is not None and stream != _NO_SYNCHRONIZATION:
            reader = ExternalStream(self._device, _LEGACY_STREAM if stream is None else stream)
            with self._device.use():
                reader.wait_for_stream(self.producer)
        return self._capsule()

    def numpy(self) -> Array:
        """Copy it to the host; waits for the work that writes it."""
        result: Array = np.empty(self.shape, self.dtype)
        if not result.nbytes:
            return result
        with self._device.use():
            stream = Stream(self._device)
            staging = PinnedBuffer(self._device, result.nbytes)
            try:
                if self.producer is not None:
                    stream.wait_for_stream(self.producer)
                copy_to_host(self._device, staging.address, self.address, result.nbytes, stream)
                stream.synchronize()
                result[...] = staging.view(self.dtype, self.shape)
            finally:
                staging.close()
                stream.close()
        return result

    def _capsule(self) -> Any:
        """Let numpy make the capsule, over an address that it never reads, and name the GPU in it.

        So the capsule's destructor and the tensor's deleter are numpy's, in C. Written with ctypes they would run
        Python while an error of the reader is on its way, and lose it.
        """
        is_bool = self.dtype == np.dtype(bool)  # DLPack of numpy before 1.25 knows no bool
        dtype = np.dtype(np.uint8) if is_bool else self.dtype
        capsule: Any = array_over(self.address, self.shape, dtype, self.owner).__dlpack__()
        tensor = tensor_of(capsule)
        tensor.device.device_type, tensor.device.device_id = self.__dlpack_device__()
        if is_bool:
            tensor.dtype.code = _KDL_BOOL
        return capsule
