"""The repository's manifest of one model, ``NAME/versions.json``: what each version is, and what happened to them.

Which version is active stands in ``config.pbtxt`` and nowhere else; this file only explains it. A kill between the two
leaves an entry for a step that did not happen, and readers see that by the config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError

from trtdeploy.errors import RepositoryError, TrtDeployError
from trtdeploy.file_format import FileFormat
from trtdeploy.files import atomic_write
from trtdeploy.frozen_model import FrozenModel
from trtdeploy.plan import Manifest
from trtdeploy.version import __version__

HISTORY_FILE = "versions.json"
Step = Literal["package", "publish", "promote", "rollback", "withdraw", "prune", "retune"]
"""What happens to versions. "withdraw" takes a promotion or rollback back that has failed on the server."""


class VersionFacts(FrozenModel):
    """One version.

    Attributes:
        plan_sha256: Digest of the plan.
        onnx_sha256: Digest of the ONNX file that it was built from.
        runtime: The library that alone loads it, and its version.
        device: What it was built for.
        accuracy: Top-1 and samples of every stage of the ledger that the plan carries.
        latency_ms: Median latency that the build measured of the tactic that it took; None where none was measured.
        published_at: UTC time, ISO 8601.
    """

    plan_sha256: str
    onnx_sha256: str
    runtime: dict[str, str]
    device: dict[str, str]
    accuracy: dict[str, Any] | None
    latency_ms: float | None
    published_at: str

    @classmethod
    def of(cls, manifest: Manifest) -> VersionFacts:
        """Take the facts from a plan's manifest."""
        tactic = manifest.tactic
        return cls(
            plan_sha256=manifest.plan_sha256,
            onnx_sha256=manifest.onnx.sha256,
            runtime=manifest.runtime.model_dump(),
            device=manifest.device.model_dump(),
            accuracy=manifest.ledger,
            latency_ms=min(tactic.milliseconds.values(), default=None) if tactic is not None else None,
            published_at=now(),
        )


class Event(FrozenModel):
    """One step.

    Attributes:
        at: UTC time, ISO 8601.
        step: What was done.
        version: The version that it was about.
        before: The version that was active before.
        answered_by: How often each version has answered the known sample on the server, which confirms the step; None
            where no server was asked, or nothing came of it.
    """

    at: str
    step: Step
    version: int
    before: int | None
    answered_by: dict[str, int] | None = None


class History(FileFormat):
    """The file.

    Attributes:
        versions: Facts of every version by its number, as text.
        events: What happened, oldest first.
        config_sha256: Digest of the ``config.pbtxt`` that was written last; another one there means an edit by hand.
    """

    TITLE: ClassVar[str] = "a manifest of versions"
    ERROR: ClassVar[type[TrtDeployError]] = RepositoryError

    format: Literal[1] = 1
    minor: int = Field(default=1, ge=0)
    written_by: str = __version__
    versions: dict[str, VersionFacts] = Field(default_factory=dict)
    events: tuple[Event, ...] = ()
    config_sha256: tuple[str, ...] = ()

    def with_version(self, number: int, manifest: Manifest) -> History:
        """Return the history with the facts of one more version."""
        return self.model_copy(update={"versions": {**self.versions, str(number): VersionFacts.of(manifest)}})

    def with_event(self, step: Step, version: int, before: int | None) -> History:
        """Return the history with one more event."""
        event = Event(at=now(), step=step, version=version, before=before)
        return self.model_copy(update={"events": (*self.events, event)})

    def with_answers(self, step: Step, version: int, before: int | None, answered_by: Mapping[str, int]) -> History:
        """Return the history with the answers of a server at its last event, which is added if it is another one."""
        last = self.events[-1] if self.events else None
        known = last is not None and (last.step, last.version) == (step, version)
        history = self if known else self.with_event(step, version, before)
        event = history.events[-1].model_copy(update={"answered_by": dict(answered_by)})
        return history.model_copy(update={"events": (*history.events[:-1], event)})

    def before(self, active: int) -> int | None:
        """Return the version that was active before ``active`` became so; None if nobody knows."""
        for event in reversed(self.events):
            if event.step in ("promote", "rollback") and event.version == active and event.before != active:
                return event.before
        return None


def read_history(folder: Path) -> History:
    """Read a model's manifest; an empty one where there is none yet.

    Raises:
        RepositoryError: It is damaged, or of a newer trtdeploy, in a format that this one does not read.
    """
    path = folder / HISTORY_FILE
    try:
        return History.read(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        return History()
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise RepositoryError(
            f"{path} is not a manifest of this version: {error}",
            hint="Move it away: the versions themselves and what is served do not depend on it.",
        ) from error


def write_history(folder: Path, history: History) -> None:
    """Replace a model's manifest."""
    atomic_write(folder / HISTORY_FILE, json.dumps(history.model_dump(mode="json"), indent=2) + "\n")


def now() -> str:
    """Return the time as the manifest has it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
