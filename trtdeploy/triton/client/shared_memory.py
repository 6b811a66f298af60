"""System shared memory: tensors that the server reads and writes in place, where it runs on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np

from trtdeploy.errors import ServerError, ShapeError
from trtdeploy.tensors import BYTES, DYNAMIC, Array, TensorSpec
from trtdeploy.triton.client.errors import SharedMemoryError
from trtdeploy.triton.client.messages import Region, raw_content

_ALIGNMENT = 64
Register = Callable[[str, str, int], None]
"""Tells the server of a region: its name, its key, its size in bytes."""
Unregister = Callable[[str], None]
Registered = Callable[[], Iterable[str]]
"""Returns the names of the regions that the server knows."""
_PREFIX = "trtdeploy-"
_FILES = Path("/dev/shm")  # where Linux shows POSIX shared memory
logger = logging.getLogger(__name__)


class SharedRegions:
    """Regions of shared memory for requests in flight; each belongs to one request at a time.

    Names are random, so that no two runs ever meet. A region of a request that failed is not used again: the server may
    still write to it. ``close`` takes all of them from the server, and from this machine. If this process is killed,
    multiprocessing's resource tracker removes them from this machine, and the next run from the server.

    Args:
        register: Tells the server of a region.
        unregister: Takes it from the server.
        registered: Returns the regions that the server knows.
    """

    def __init__(self, register: Register, unregister: Unregister, registered: Registered) -> None:
        self._register = register
        self._unregister = unregister
        self._registered = registered
        self._looked = False
        self._closed = False
        self._lock = threading.Lock()
        self._free: list[SharedMemory] = []
        self._all: list[SharedMemory] = []

    @contextmanager
    def borrowed(self, byte_size: int) -> Iterator[SharedMemory]:
        """Lend a region of at least so many bytes that the server knows.

        Raises:
            ServerError: The server does not take it, or this is closed.
        """
        with self._lock:
            if self._closed:
                raise ServerError("The connection is closed; its shared memory is gone.")
            fitting = [memory for memory in self._free if memory.size >= byte_size]
            memory = fitting[0] if fitting else None
            if memory is not None:
                self._free.remove(memory)
        if memory is None:
            memory = self._new(byte_size)
        yield memory
        with self._lock:  # only after an answer
            self._free.append(memory)

    def close(self) -> None:
        """Give all regions back, also where the server does not answer any more."""
        with self._lock:
            self._closed = True
            memories, self._all, self._free = self._all, [], []
        answers = True
        for memory in memories:
            try:
                if answers:
                    self._unregister(memory.name)
            except ServerError as error:
                answers = False  # it has ended, and its registrations with it; or it is about to
                logger.info("%s was not unregistered: %s", memory.name, error.message)
            finally:
                _remove(memory)

    def _take_out_of_the_killed(self) -> None:
        """Take from the server what runs have left there that were killed: their files are gone."""
        with self._lock:
            looked, self._looked = self._looked, True
        if looked or not _FILES.is_dir():
            return
        for name in self._registered():
            if name.startswith(_PREFIX) and not (_FILES / name).exists():
                with contextlib.suppress(ServerError):  # another run may have been quicker
                    self._unregister(name)

    def _new(self, byte_size: int) -> SharedMemory:
        self._take_out_of_the_killed()
        name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        with self._lock:  # known before the server is: close() has to find it
            if self._closed:
                raise ServerError("The connection is closed; its shared memory is gone.")
            memory = SharedMemory(name, create=True, size=byte_size)
            self._all.append(memory)
        _reserve(name, byte_size)
        self._register(name, f"/{name}", memory.size)
        return memory


def _reserve(name: str, byte_size: int) -> None:
    """Take the pages now: writing to one that is not there later would kill the process (SIGBUS).

    Raises:
        SharedMemoryError: There are not so many.
    """
    if not (_FILES / name).exists():
        return
    file = os.open(_FILES / name, os.O_RDWR)
    try:
        os.posix_fallocate(file, 0, byte_size)
    except OSError as error:
        raise SharedMemoryError(
            f"There is no room for a request of {byte_size} bytes in {_FILES}: {error.strerror}.",
            hint="Send fewer samples or fewer requests at once, or make it larger (containers: --shm-size).",
        ) from error
    finally:
        os.close(file)


def _remove(memory: SharedMemory) -> None:
    with contextlib.suppress(BufferError):  # an interrupted thread may hold a view; the memory goes with the process
        memory.close()
    with contextlib.suppress(FileNotFoundError):
        memory.unlink()


class Layout:
    """Where in one region the tensors of a request lie: inputs, then those outputs whose size is known beforehand.

    Args:
        inputs: Arrays by name.
        outputs: What the model answers. The first dimension, where it is dynamic, is taken from the inputs; an output
            with other dynamic dimensions, or of BYTES, is left out: it travels with the message.
    """

    def __init__(self, inputs: Mapping[str, Array], outputs: tuple[TensorSpec, ...]) -> None:
        self._contents = {
            name: np.frombuffer(raw_content(array), np.uint8) if array.dtype == np.object_ else array
            for name, array in inputs.items()
        }
        rows = {len(array) for array in inputs.values() if array.ndim}
        sizes = {name: content.nbytes for name, content in self._contents.items()}
        for spec in outputs:
            size = _output_bytes(spec, rows)
            if size is not None:
                sizes[spec.name] = size
        self._places: dict[str, tuple[int, int]] = {}
        self.byte_size = 0
        for name, size in sizes.items():
            self._places[name] = (self.byte_size, size)
            self.byte_size += -(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT

    def regions(self, memory: SharedMemory) -> dict[str, Region]:
        """Return where the tensors lie, by name."""
        return {name: Region(memory.name, size, offset) for name, (offset, size) in self._places.items()}

    def write(self, memory: SharedMemory) -> None:
        """Put the inputs in their places."""
        for name, content in self._contents.items():
            offset, _ = self._places[name]
            np.ndarray(content.shape, content.dtype, memory.buf, offset)[...] = content

    def read(self, memory: SharedMemory, spec: TensorSpec, shape: tuple[int, ...]) -> Array:
        """Return a copy of an output that the server has put in its place.

        Raises:
            ShapeError: It says that it has put more there than there is place for.
        """
        offset, size = self._places[spec.name]
        dtype = np.dtype(spec.dtype)
        if int(np.prod(shape)) * dtype.itemsize > size:
            raise ShapeError(f"The output {spec.name} of shape {list(shape)} has no place in {size} bytes.")
        return np.ndarray(shape, dtype, memory.buf, offset).copy()


def _output_bytes(spec: TensorSpec, rows: set[int]) -> int | None:
    shape = list(spec.shape)
    if shape and shape[0] == DYNAMIC and len(rows) == 1:
        shape[0] = next(iter(rows))
    if DYNAMIC in shape or spec.dtype == BYTES:
        return None
    return int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
