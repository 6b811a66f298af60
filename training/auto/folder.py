"""The folder of a run of ``training auto``: made for one set of settings, and for no other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.loop.epochs import TrainingInterrupted
from trtdeploy.errors import UsageError
from trtdeploy.files import atomic_write

SETTINGS_FILE = "settings.json"


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make a folder for a run with these settings, or go on in the one that an earlier run with them made.

    Args:
        folder: Made if it is missing.
        settings: What decides the checkpoints of the run; JSON. The budget is not among them: another one may be asked
            for on the same checkpoints.

    Raises:
        UsageError: The folder holds a run with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_FILE
    wanted = json.loads(json.dumps(settings))
    if not path.is_file():
        atomic_write(path, json.dumps(wanted, indent=2) + "\n")
        return
    hint = "Give another --output, repeat the options of that run, or delete the folder."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} cannot be read: {error}.", hint=hint) from error
    if found != wanted:
        known = found if isinstance(found, dict) else {}
        others = [
            f"{name} was {json.dumps(known.get(name))} and is {json.dumps(value)} now"
            for name, value in wanted.items()
            if known.get(name) != value
        ]
        raise UsageError(f"{folder} holds a run with other settings: {'; '.join(others) or path.name}.", hint=hint)


@contextmanager
def kept_when_interrupted(folder: Path) -> Iterator[None]:
    """Say on Ctrl-C how to go on, which is not how the single steps are gone on with.

    Raises:
        TrainingInterrupted: Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise TrainingInterrupted(
            f"Interrupted: what is complete is kept in {folder}; run the same command to go on."
        ) from error
