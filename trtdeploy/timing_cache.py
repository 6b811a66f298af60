"""Measured timings that outlive a build, shared safely between threads and processes.

One file, one lock that spans reading, merging and replacing it: no update is lost, no reader sees a part.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtdeploy.errors import TimingCacheError
from trtdeploy.files import atomic_write, locked

logger = logging.getLogger(__name__)


class _CacheFile(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    format: Literal[1] = 1
    milliseconds: dict[str, Annotated[float, Field(gt=0)]]


class TimingCache:
    """Median milliseconds by key; a key names the runtime, its version, the device, the model, shapes and tactic.

    Args:
        path: The JSON file; it need not exist yet.
        timeout_s: How long to wait for the lock.
    """

    def __init__(self, path: str | Path, *, timeout_s: float = 60.0) -> None:
        self.path = Path(path)
        self._timeout_s = timeout_s

    def read(self) -> dict[str, float]:
        """Return all timings. A file that is no timing cache is set aside with a warning, and counts as empty.

        Raises:
            TimingCacheError: The file cannot be read or locked.
        """
        with self._locked():
            return self._read()

    def merge(self, milliseconds: Mapping[str, float]) -> None:
        """Add timings, replacing those of the same key.

        Raises:
            TimingCacheError: The file cannot be locked or written, or a timing is not finite and positive.
        """
        broken = [key for key, value in milliseconds.items() if not (math.isfinite(value) and value > 0)]
        if broken:
            raise TimingCacheError(f"Timings must be finite and positive; {broken[0]!r} is {milliseconds[broken[0]]}.")
        with self._locked():
            merged = {**self._read(), **milliseconds}
            atomic_write(self.path, _CacheFile(milliseconds=dict(sorted(merged.items()))).model_dump_json(indent=1))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with locked(self.path, timeout_s=self._timeout_s, error=TimingCacheError):
                yield
        except OSError as error:
            raise TimingCacheError(f"The timing cache {self.path} cannot be used: {error}.") from error

    def _read(self) -> dict[str, float]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        try:
            return _CacheFile.model_validate_json(content).milliseconds
        except ValidationError as error:
            return self._quarantine(str(error.errors()[0]["msg"]))

    def _quarantine(self, reason: str) -> dict[str, float]:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.corrupt-{number}")).exists():
            number += 1
        self.path.rename(aside)
        logger.warning("%s is not a timing cache (%s); set aside as %s, starting anew", self.path, reason, aside.name)
        return {}
