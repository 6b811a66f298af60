"""The state of an unfinished training run, beside the checkpoint it will become."""

from __future__ import annotations

import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.checkpoints.weights import load_weights_only
from trtdeploy.errors import CheckpointError
from trtdeploy.files import atomic_write

_FORMAT = 2


@dataclass(frozen=True)
class ResumeState:
    """Everything that decides how training goes on, in tensors and primitives.

    Order and augmentation of the images need no state: they follow from seed and epoch. Neither does the learning
    rate: it follows from the step.
    """

    digest: str
    epoch: int
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    ranges: dict[str, Tensor]
    torch_rng: Tensor
    best_epoch: int
    best_dev: dict[str, Any]
    best_model: dict[str, Tensor]
    history: list[dict[str, Any]]


def resume_path_for(output: Path) -> Path:
    """Return where the state of the run that will write ``output`` is kept."""
    return output.with_name(f"{output.stem}.resume.pt")


def save_resume(path: Path, state: ResumeState) -> None:
    """Write the state as a whole."""
    buffer = io.BytesIO()
    content = {entry.name: getattr(state, entry.name) for entry in fields(state)}
    torch.save({"format": _FORMAT, **content}, buffer)
    atomic_write(path, buffer.getvalue())


def load_resume(path: Path, digest: str) -> ResumeState:
    """Read a state that was written with the same settings.

    Raises:
        CheckpointError: There is none, it is corrupt, or its settings were others.
    """
    if not path.is_file():
        raise CheckpointError(
            f"There is no unfinished run to resume at {path}.",
            hint="Leave out --resume to start one; a run that completed deletes the file.",
        )
    content = load_weights_only(path)
    names = {entry.name for entry in fields(ResumeState)}
    if not isinstance(content, dict) or set(content) != {"format"} | names or content["format"] != _FORMAT:
        raise CheckpointError(f"{path} is not the state of an unfinished run of this version.")
    if content["digest"] != digest:
        raise CheckpointError(
            f"{path} belongs to a run with other settings (options, data, seed or starting checkpoint).",
            hint="Repeat the options of the interrupted run, or leave out --resume to start anew.",
        )
    return ResumeState(**{name: content[name] for name in names})


def delete_resume(path: Path) -> None:
    """Forget a run that has completed."""
    path.unlink(missing_ok=True)
