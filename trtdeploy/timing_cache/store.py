"""What every kind of cache file has in common: the lock, the replacement as a whole, and setting bad files aside."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

from trtdeploy.errors import TimingCacheError
from trtdeploy.files import locked
from trtdeploy.timing_cache.trtexec_lock import trtexec_lock

logger = logging.getLogger("trtdeploy.timing_cache")

CacheMode = Literal["update", "read-only", "verify"]
"""Whether a cache may be changed, and whether a build may measure what it lacks; see ``BuildConfig``."""
AsideKind = Literal["corrupt", "foreign"]


def place(path: str | Path, file_name: str) -> Path:
    """Return the cache file that ``path`` means: itself, or ``file_name`` in it if it is a folder or ends like one.

    A symbolic link is followed: replacing the link itself would cut off everybody else who uses its target.
    """
    ends = tuple(separator for separator in (os.sep, os.altsep) if separator)
    is_folder = os.fspath(path).endswith(ends) or Path(path).is_dir()
    file = Path(path) / file_name if is_folder else Path(path)
    return file.resolve() if file.is_symlink() else file


class CacheStore:
    """A cache file under one lock, against other threads and processes.

    Args:
        path: The file; it need not exist yet.
        mode: "update" reads and writes; "read-only" and "verify" change nothing on disk, not even a bad file.
        timeout_s: How long to wait for the lock.
        sidecar: A file beside it that is written under the same lock.
        shared_with_trtexec: Other programs use the file; keep their lock, too.
    """

    def __init__(
        self,
        path: Path,
        *,
        mode: CacheMode = "update",
        timeout_s: float = 60.0,
        sidecar: Path | None = None,
        shared_with_trtexec: bool = False,
    ) -> None:
        self.path = path
        self.mode = mode
        self._timeout_s = timeout_s
        self._sidecar = sidecar
        self._shared_with_trtexec = shared_with_trtexec

    @property
    def writable(self) -> bool:
        """Whether the cache may be changed."""
        return self.mode == "update"

    @contextmanager
    def access(self, refuse_foreign: Callable[[], object]) -> Iterator[None]:
        """Hold the lock; leftovers of writers that were killed are removed first.

        ``refuse_foreign`` raises for a file that is no cache: it is called before anything is written beside the file.

        Modes that change nothing hold none: a folder that nobody may write to, as in a container image, has no place
        for a lock file. They see whole files even so, because every file is replaced as a whole.

        Raises:
            TimingCacheError: Somebody else held it for too long, or the file or its folder cannot be used.
        """
        try:
            with ExitStack() as stack:
                if self.path.exists() and not self.path.is_file():
                    raise TimingCacheError(f"The timing cache {self.path} cannot be used: it is no regular file.")
                refuse_foreign()
                if self.writable:
                    stack.enter_context(locked(self.path, timeout_s=self._timeout_s, error=TimingCacheError))
                    if self._shared_with_trtexec:
                        stack.enter_context(trtexec_lock(self.path, timeout_s=self._timeout_s))
                    self._remove_leftovers()
                yield
        except OSError as error:
            denied = self.writable and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
            raise TimingCacheError(
                f"The timing cache {self.path} cannot be used: {error}.",
                hint="Mode 'read-only' writes nothing, not even a lock." if denied else None,
            ) from error

    def read(self) -> bytes | None:
        """Return the content; None where there is no file."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def set_aside(self, kind: AsideKind, reason: str, *, sidecar: Path | None = None) -> None:
        """Rename a damaged cache, or one of another machine, so that the build can go on; hold the lock.

        Only for files that are known to be written by this package; ``refusal`` is for everything else.

        Args:
            kind: What the new name says.
            reason: For the warning, or for the error.
            sidecar: What goes with it, second: a kill between the two leaves a sidecar that vouches for no file.

        Raises:
            TimingCacheError: The mode forbids to change anything.
        """
        if not self.writable:
            raise TimingCacheError(
                f"The timing cache {self.path} cannot be used: {reason}.",
                hint=f"Mode {self.mode!r} leaves it as it is; use another file, or mode 'update', which sets it aside.",
            )
        aside = _free_name(self.path, kind)
        self.path.rename(aside)
        if sidecar is not None:
            sidecar.rename(aside.with_name(f"{aside.name}.json"))
        logger.warning(
            "the timing cache %s cannot be used: %s; set aside as %s, starting anew", self.path, reason, aside.name
        )

    def refusal(self, reason: str) -> TimingCacheError:
        """Return the error for a file that may be anything: it stays where it is."""
        return TimingCacheError(
            f"The timing cache {self.path} cannot be used: {reason}.",
            hint="trtdeploy leaves it as it is; use another file, which need not exist yet, or a folder.",
        )

    def clear_sidecar_place(self) -> None:
        """Rename a damaged sidecar rather than overwrite it; hold the lock."""
        if self._sidecar is not None and self._sidecar.exists():
            aside = _free_name(self._sidecar, "corrupt")
            self._sidecar.rename(aside)
            logger.warning("the sidecar %s is damaged; set aside as %s", self._sidecar, aside.name)

    def _remove_leftovers(self) -> None:
        """Remove temporary files of writers that died: whoever holds the lock is the only writer."""
        names = [file.name for file in (self.path, self._sidecar) if file is not None]
        pattern = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.[0-9a-f]{{16}}\.tmp")
        for entry in self.path.parent.iterdir():
            if pattern.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    entry.unlink()


def _free_name(path: Path, kind: AsideKind) -> Path:
    number = 1
    while any(path.with_name(f"{path.name}.{kind}-{number}{end}").exists() for end in ("", ".json")):
        number += 1
    return path.with_name(f"{path.name}.{kind}-{number}")
