"""Atomic writes, digests and locks."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from trtdeploy.errors import TrtDeployError, UsageError

_CHUNK_BYTES = 1 << 20


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside ``path`` and rename it into place when the block ends without an error.

    Readers see the old content or the new one, never a part. The content is on disk before it gets its name. On any
    error, Ctrl-C included, the temporary file is removed and ``path`` is as it was. A replaced file keeps its mode.

    Raises:
        OSError: The folder cannot be written or the disk is full.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp: a file made with 0o666 gets the umask's mode from the kernel; reading the umask is no thread's right.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        error.filename = str(target)  # the name that the caller knows
        raise
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        with suppress(FileNotFoundError):
            temporary.chmod(target.stat().st_mode & 0o777)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def atomic_write(path: str | Path, content: bytes | str) -> None:
    """Replace the content of ``path`` as a whole; text is written as UTF-8."""
    with atomic_writer(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


def keep_inputs(output: str | Path, *inputs: str | Path | None, what: str = "output") -> None:
    """Refuse an output that would replace what it is made from, before any work is done.

    Raises:
        UsageError: The output is one of the inputs, by this name or another one.
    """
    for path in inputs:
        if path is not None and Path(path).exists() and same_file(output, path):
            raise UsageError(f"The {what} {output} would replace the input {path}.", hint="Choose another name.")


def same_file(first: str | Path, second: str | Path) -> bool:
    """Say whether two names are, or would be, those of one file."""
    one, other = Path(first), Path(second)
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_bytes(content: bytes) -> str:
    """Return the hexadecimal SHA-256 of ``content``."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file without holding it in memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def locked(
    path: str | Path, *, timeout_s: float = 60.0, error: type[TrtDeployError] = TrtDeployError
) -> Iterator[None]:
    """Hold the lock of ``path`` (a file ``.<name>.lock`` beside it) against other threads and processes.

    The operating system releases it when its holder dies. The lock file itself is left in place: removing it would
    let two holders lock two different files of the same name.

    Raises:
        TrtDeployError: Of type ``error``: the lock cannot be made, or somebody else held it for longer than
            ``timeout_s`` seconds.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock_path = target.with_name(f".{target.name}.lock")
    lock = FileLock(lock_path, thread_local=False)
    try:
        # FileLock would wait until its time is up for a file that cannot be made
        os.close(os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
    except OSError as reason:
        raise error(f"{target} cannot be locked: {reason}.") from reason
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout as timeout:
        raise error(
            f"{target} stayed locked by another process or thread for {timeout_s:g} s.",
            hint=f"Wait for it to finish; the lock is {lock_path}.",
        ) from timeout
    try:
        yield
    finally:
        lock.release()
