"""From the values of options to what the functions behind the commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.checkpoints.checkpoint import Checkpoint
    from training.loop.schedule import Schedule
    from training.qat.distillation import DistillationSettings
    from trtdeploy.data import Dataset


def open_data(
    data: str, *, checkpoint: Path | None, model: str | None, image_size: int | None, split_seed: int | None
) -> tuple[Checkpoint | None, Dataset, int]:
    """Open a dataset, and a checkpoint where there is one; see ``open_both``."""
    if checkpoint is not None:
        return open_both(data, checkpoint, model=model, image_size=image_size, split_seed=split_seed)
    from trtdeploy.data import open_dataset

    return None, open_dataset(data, split_seed=split_seed or 0), split_seed or 0


def open_both(
    data: str,
    checkpoint: Path,
    *,
    model: str | None = None,
    image_size: int | None = None,
    split_seed: int | None,
) -> tuple[Checkpoint, Dataset, int]:
    """Open a checkpoint and a dataset, split with the seed that the checkpoint was made with if none is given.

    Returns:
        The checkpoint, the dataset, which the caller closes, and the split seed.

    Raises:
        TrtDeployError: One of them cannot be opened, or they do not fit.
    """
    from training.checkpoints.checkpoint import load_checkpoint, split_seed_of
    from trtdeploy.data import open_dataset

    if split_seed is None:
        split_seed = split_seed_of(checkpoint)
    dataset = open_dataset(data, split_seed=split_seed)
    try:
        return load_checkpoint(checkpoint, model=model, image_size=image_size, dataset=dataset), dataset, split_seed
    except BaseException:
        dataset.close()
        raise


def open_teacher(path: Path, student: Checkpoint) -> Checkpoint:
    """Load a float checkpoint; what it does not say about itself is taken from the student.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    from training.checkpoints.checkpoint import load_checkpoint

    return load_checkpoint(path, like=student.facts)


def distillation_from(
    teacher: Path | None, weight: float | None, temperature: float | None, *, distill_only: bool
) -> DistillationSettings:
    """Return the settings of distillation, with the defaults where no option says otherwise.

    Raises:
        UsageError: Options contradict each other, or a number makes no sense.
    """
    from training.qat.distillation import DistillationSettings
    from trtdeploy.errors import UsageError

    if teacher is None and (weight is not None or temperature is not None or distill_only):
        raise UsageError("--teacher-weight, --temperature and --distill-only need --teacher.")
    if distill_only and weight not in (None, 1.0):
        raise UsageError(f"--distill-only is --teacher-weight 1, not {weight:g}.")
    if weight is not None and not 0 < weight <= 1:
        raise UsageError(f"--teacher-weight {weight:g} is not above 0 and at most 1.")
    if temperature is not None and not temperature > 0:
        raise UsageError(f"--temperature {temperature:g} is not above 0.")
    given = {"weight": 1.0 if distill_only else weight, "temperature": temperature}
    return DistillationSettings(**{name: value for name, value in given.items() if value is not None})


def schedule_from(
    default: Schedule,
    epochs: int | None,
    max_steps: int | None,
    batch_size: int | None,
    learning_rate: float | None,
    shift: int | None,
    flip: bool,
    seed: int,
) -> Schedule:
    """Return the default schedule, with what options were given for replaced."""
    from training.loop.augmentation import Augmentation
    from training.loop.schedule import Schedule

    given: dict[str, Any] = {
        "epochs": epochs,
        # Whoever asks for epochs means all of them.
        "max_steps": max_steps if max_steps is not None or epochs is None else 0,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
    }
    values = default.model_dump() | {name: value for name, value in given.items() if value is not None}
    values["max_steps"] = values["max_steps"] or None
    values["seed"] = seed
    values["augmentation"] = Augmentation(shift_px=default.augmentation.shift_px if shift is None else shift, flip=flip)
    return Schedule(**values)
