"""The lock that other programs take on a TensorRT timing cache."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trtdeploy.errors import TimingCacheError

_POLL_S = 0.02


@contextmanager
def trtexec_lock(path: Path, *, timeout_s: float) -> Iterator[None]:
    """Hold ``<path>.lock`` as ``trtexec`` and Polygraphy do: with a record lock, which the file outlives.

    Source: ``shared/utils/fileLock.cpp`` of TensorRT's repository, ``polygraphy/util/util.py``. A record lock belongs
    to the process: it keeps no thread out, and goes with the first descriptor of the file that the process closes. So
    hold the own lock of the cache first, which lets one thread of one process through. Both programs hold it only
    while they read or write the file, not during a build.

    Raises:
        TimingCacheError: Another program held it for longer than ``timeout_s`` seconds.
        OSError: The lock file cannot be made.
    """
    import fcntl

    lock_path = path.with_name(f"{path.name}.lock")
    deadline = time.monotonic() + timeout_s
    descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError) as error:  # POSIX allows EAGAIN and EACCES
                if time.monotonic() >= deadline:
                    raise TimingCacheError(
                        f"{path} stayed locked by another program, such as trtexec, for {timeout_s:g} s.",
                        hint=f"Wait for it to finish; the lock is {lock_path}.",
                    ) from error
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(descriptor)  # gives the lock back
