"""What every kind of cache file has in common: the lock, the replacement as a whole, and setting bad files aside."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from trtdeploy.errors import TimingCacheError
from trtdeploy.files import locked

logger = logging.getLogger("trtdeploy.timing_cache")

CacheMode = Literal["update", "read-only", "verify"]


class CacheStore:
    """A cache file under one lock, against other threads and processes.

    Args:
        path: The file; it need not exist yet.
        mode: "update" reads and writes; "read-only" and "verify" change nothing on disk, not even a bad file.
        timeout_s: How long to wait for the lock.
    """

    def __init__(self, path: str | Path, *, mode: CacheMode = "update", timeout_s: float = 60.0) -> None:
        self.path = Path(path)
        self.mode = mode
        self._timeout_s = timeout_s

    @property
    def writable(self) -> bool:
        """Whether the cache may be changed."""
        return self.mode == "update"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock; leftovers of writers that were killed are removed first.

        Raises:
            TimingCacheError: Somebody else held it for too long, or the folder cannot be used.
        """
        try:
            with locked(self.path, timeout_s=self._timeout_s, error=TimingCacheError):
                if self.writable:
                    self._remove_leftovers()
                yield
        except OSError as error:
            raise TimingCacheError(f"The timing cache {self.path} cannot be used: {error}.") from error

    def read(self) -> bytes | None:
        """Return the content; None where there is no file."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def set_aside(self, kind: Literal["corrupt", "foreign"], reason: str) -> None:
        """Rename a file that is no cache, or somebody else's, so that the build can go on; hold the lock.

        Raises:
            TimingCacheError: The mode forbids to change anything.
        """
        if not self.writable:
            raise TimingCacheError(
                f"The timing cache {self.path} cannot be used: {reason}.",
                hint=f"Mode {self.mode!r} leaves it as it is; use another file, or mode 'update', which sets it aside.",
            )
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{kind}-{number}")).exists():
            number += 1
        self.path.rename(aside)
        logger.warning(
            "the timing cache %s cannot be used: %s; set aside as %s, starting anew", self.path, reason, aside.name
        )

    def _remove_leftovers(self) -> None:
        """Remove temporary files of writers that died: whoever holds the lock is the only writer."""
        pattern = re.compile(rf"\.{re.escape(self.path.name)}(\.json)?\.[0-9a-f]{{16}}\.tmp")
        for entry in self.path.parent.iterdir():
            if pattern.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    entry.unlink()
