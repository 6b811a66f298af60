"""The tactics that were measured with ONNX Runtime, as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationError

from trtdeploy.errors import TimingCacheError, TrtDeployError
from trtdeploy.file_format import FileFormat
from trtdeploy.files import atomic_write
from trtdeploy.timing_cache.sidecar import read_pair, sidecar_path
from trtdeploy.timing_cache.store import CacheMode, CacheStore, logger, place
from trtdeploy.version import __version__


class MeasuredTimings(FileFormat):
    """The file's content.

    Attributes:
        milliseconds: Median by key.
    """

    TITLE: ClassVar[str] = "a timing cache"
    ERROR: ClassVar[type[TrtDeployError]] = TimingCacheError
    OTHERWISE: ClassVar[str] = " Or use another file, which need not exist yet."

    format: Literal[1] = 1
    milliseconds: dict[str, Annotated[float, Field(gt=0)]]
    minor: int = Field(default=1, ge=0)
    written_by: str = __version__


_BEGINNING = MeasuredTimings(milliseconds={}).model_dump_json(indent=1).partition("{}")[0].encode() + b"{"
"""Of every file that this module writes: what begins so and cannot be read is a damaged one."""


def parse_measured(path: Path, content: bytes) -> dict[str, float] | None:
    """Return the timings of a file's content; None if it holds none.

    Raises:
        TimingCacheError: A newer trtdeploy wrote it, in a format that this one does not read.
    """
    try:
        return MeasuredTimings.read(content, path).milliseconds
    except ValidationError:
        return None


class TimingCache:
    """Median milliseconds by key; a key names the runtime, its version, the device, the model, shapes and tactic.

    Args:
        path: The JSON file, which need not exist yet; in a folder (one that exists, or a text that ends in a
            separator) the file ``onnxruntime.timing``.
        timeout_s: How long to wait for the lock.
        mode: Whether it may be changed; see ``CacheStore``.
    """

    def __init__(self, path: str | Path, *, timeout_s: float = 60.0, mode: CacheMode = "update") -> None:
        self.path = place(path, "onnxruntime.timing")
        self.mode = mode
        self._store = CacheStore(self.path, mode=mode, timeout_s=timeout_s)

    def read(self) -> dict[str, float]:
        """Return all timings. A damaged cache is set aside with a warning, and counts as empty.

        Raises:
            TimingCacheError: The file cannot be read or locked, is something else than a timing cache of trtdeploy, or
                the mode forbids to set it aside.
        """
        with self._store.access(self._refuse_foreign):
            return self._read()

    def merge(self, milliseconds: Mapping[str, float]) -> None:
        """Add timings, replacing those of the same key; modes that forbid changes write nothing.

        When it returns, they are on disk and survive a power cut. On an error, the file is as it was.

        Raises:
            TimingCacheError: The file cannot be locked or written, or a timing is not finite and positive.
        """
        broken = [key for key, value in milliseconds.items() if not (math.isfinite(value) and value > 0)]
        if broken:
            raise TimingCacheError(f"Timings must be finite and positive; {broken[0]!r} is {milliseconds[broken[0]]}.")
        if not self._store.writable:
            return
        with self._store.access(self._refuse_foreign):
            merged = {**self._read(), **milliseconds}
            content = MeasuredTimings(milliseconds=dict(sorted(merged.items())))
            atomic_write(self.path, content.model_dump_json(indent=1))

    def _refuse_foreign(self) -> bytes | None:
        """Return the content; refuse what is neither empty, nor timings, nor a cache of trtdeploy that is damaged."""
        content = self._store.read()
        if content and parse_measured(self.path, content) is None and not content.startswith(_BEGINNING):
            blob, sidecar = read_pair(self.path)
            if blob is None or sidecar is None or not sidecar.vouches_for(blob):
                raise self._store.refusal("it is not a timing cache of ONNX Runtime")
        return content

    def _read(self) -> dict[str, float]:
        content = self._refuse_foreign()
        if content is None:
            if self.mode == "read-only":
                logger.warning("there is no timing cache at %s; mode 'read-only' makes none", self.path)
            return {}
        if not content and self._store.writable:
            return {}  # as mktemp leaves it: nothing is lost
        try:
            return MeasuredTimings.read(content, self.path).milliseconds
        except ValidationError as error:
            blob, sidecar = read_pair(self.path)
            if blob is not None and sidecar is not None and sidecar.vouches_for(blob):
                whose = f"{sidecar.fingerprint.runtime} {sidecar.fingerprint.version}"
                reason = f"it is not a timing cache of ONNX Runtime but one of {whose}"
                self._store.set_aside("foreign", reason, sidecar=sidecar_path(self.path))
            else:
                self._store.set_aside("corrupt", f"it is not a timing cache ({error.errors()[0]['msg']})")
            return {}
