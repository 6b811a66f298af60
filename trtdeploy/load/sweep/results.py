"""What a sweep has measured so far, as JSON lines: a head that says what of, then one line per load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from trtdeploy.errors import UsageError
from trtdeploy.files import atomic_write
from trtdeploy.load.sweep.choice import SweepPoint
from trtdeploy.load.sweep.space import Candidate

_FORMAT = 1


class Refused(BaseModel):
    """A candidate that cannot be served.

    Attributes:
        candidate: Which one.
        reason: What the checker or the server says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidate: Candidate
    reason: str


class SweepResults:
    """The file and what it holds; every addition is on disk when it returns.

    Args:
        path: The file.
        head: What is measured and how; a file that is gone on with must have the same.
        resume: Go on with a file that is there.

    Raises:
        UsageError: The file holds results and ``resume`` is not given, is no file of a sweep, or has another head.
    """

    def __init__(self, path: str | Path, head: dict[str, Any], *, resume: bool = False) -> None:
        self.path = Path(path)
        self.points: list[SweepPoint] = []
        self.refused: list[Refused] = []
        self._lines = [json.dumps({"format": _FORMAT, **head})]
        if self.path.exists():
            lines = self._read()
            if not resume and lines and not self._is_head(lines[0]):
                raise UsageError(
                    f"{self.path} exists, and is not the file of a sweep.", hint="Name another file: --results FILE"
                )
            if len(lines) > 1 and not resume:  # a head alone was left by a sweep that measured nothing
                raise UsageError(
                    f"{self.path} exists.", hint="Go on with it: --resume. Or name another file: --results FILE"
                )
            if resume:
                self._go_on(lines)
        atomic_write(self.path, self._text())

    def add(self, entry: SweepPoint | Refused) -> None:
        """Keep one more result."""
        self._take(entry)
        self._lines.append(json.dumps(entry.model_dump(mode="json")))
        atomic_write(self.path, self._text())

    def missing(self, candidate: Candidate, concurrencies: tuple[int, ...]) -> list[int]:
        """Return the loads that a candidate was not measured at yet; none if it was refused."""
        if any(entry.candidate == candidate for entry in self.refused):
            return []
        done = {entry.concurrency for entry in self.of(candidate)}
        return [concurrency for concurrency in concurrencies if concurrency not in done]

    def of(self, candidate: Candidate) -> list[SweepPoint]:
        """Return what was measured of a candidate."""
        return [entry for entry in self.points if entry.candidate == candidate]

    def best_of(self, candidate: Candidate) -> SweepPoint:
        """Return where a candidate had its highest throughput."""
        return max(self.of(candidate), key=lambda entry: entry.samples_per_s)

    def _take(self, entry: SweepPoint | Refused) -> None:
        if isinstance(entry, Refused):
            self.refused.append(entry)
        else:
            self.points.append(entry)

    def _text(self) -> str:
        return "".join(f"{line}\n" for line in self._lines)

    def _read(self) -> list[str]:
        try:
            return self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{self.path} is not the file of a sweep: {error}", hint="Name another file: --results FILE"
            ) from error

    def _is_head(self, line: str) -> bool:
        """Say whether a line is the head of a sweep, of whatever model."""
        try:
            head = json.loads(line)
        except ValueError:
            return False
        return isinstance(head, dict) and head.keys() == json.loads(self._lines[0]).keys()

    def _go_on(self, lines: list[str]) -> None:
        try:
            head = dict(json.loads(lines[0]))
            entries = [_entry(line) for line in lines[1:]]
        except (ValueError, LookupError, TypeError) as error:
            raise UsageError(
                f"{self.path} is not the file of a sweep: {type(error).__name__}: {error}",
                hint="Name another file: --results FILE",
            ) from error
        wanted = json.loads(self._lines[0])
        differs = [key for key in {**head, **wanted} if head.get(key) != wanted.get(key)]
        if differs:
            said = "; ".join(f"{key} was {head.get(key)!r}, is {wanted.get(key)!r}" for key in differs)
            raise UsageError(
                f"{self.path} is of another sweep: {said}.",
                hint="Give the same options as before, or start anew with another --results FILE.",
            )
        self._lines = lines
        for entry in entries:
            self._take(entry)


def _entry(line: str) -> SweepPoint | Refused:
    try:
        return Refused.model_validate_json(line)
    except ValidationError:
        return SweepPoint.model_validate_json(line)
