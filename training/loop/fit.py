"""Train a float network, from scratch or from a checkpoint."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from training.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointFacts,
    SavedCheckpoint,
    check_output_width,
    dataset_facts,
    default_image_size,
    warn_of_other_splits,
)
from training.loop.augmentation import Augmentation
from training.loop.distributed import Workers
from training.loop.epochs import Observer, finish, train
from training.loop.objective import LabelObjective
from training.loop.optimization import Execution
from training.loop.schedule import Schedule
from training.models import DEFAULT_MODEL, create_model
from trtdeploy.data import Dataset
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import UsageError
from trtdeploy.files import sha256_bytes
from trtdeploy.ledger.evaluation import map_labels

_ALONE = Workers()
_ON_CPU = Execution()


def default_schedule(dataset: Dataset) -> Schedule:
    """Return the schedule of ``fit`` where no option says otherwise.

    The one for digits was tuned on its dev split, for a network with fresh weights and about a minute on two cores.
    """
    if dataset.name == "digits":
        return Schedule(
            epochs=9,
            batch_size=32,
            learning_rate=4e-3,
            warm_up=0.1,
            label_smoothing=0.05,
            regularise=False,
            augmentation=Augmentation(shift_px=2),
        )
    return Schedule(
        epochs=12,
        batch_size=128,
        learning_rate=2e-3,
        warm_up=0.2,
        label_smoothing=0.1,
        augmentation=Augmentation(shift_px=8),
    )


def fit(
    dataset: Dataset,
    output: Path,
    *,
    schedule: Schedule,
    model: str | None = None,
    image_size: int | None = None,
    start: Checkpoint | None = None,
    split_seed: int = 0,
    resume: bool = False,
    workers: Workers = _ALONE,
    execution: Execution = _ON_CPU,
    observer: Observer | None = None,
) -> SavedCheckpoint:
    """Train and write the epoch that scores best on the dev split.

    Args:
        dataset: Labelled images.
        output: The ``.safetensors`` file to write.
        schedule: How to train.
        model: Name of the network, or ``module:factory``; ``efficientnet_b0`` if None.
        image_size: Side of the square model input in pixels; the dataset's default if None.
        start: Float checkpoint to start from; it then decides model, labels and preprocessing.
        split_seed: The one that the dataset was opened with.
        resume: Continue an interrupted run.
        workers: The processes that train together.
        execution: Device and precision.
        observer: Is told how it goes.

    Raises:
        UsageError: The model name means nothing, or the start is quantized.
        TrainingError: The loss is no longer finite.
        CheckpointError: There is nothing to resume, or the network does not fit the labels.
    """
    started = time.perf_counter()
    torch.manual_seed(schedule.seed)
    if start is not None:
        if start.facts.kind != "float":
            raise UsageError(
                f"{start.path} is a {start.facts.kind} checkpoint; fit starts from a float one.",
                hint="Fine-tune a quantized checkpoint with: trtdeploy train qat",
            )
        warn_of_other_splits(start, dataset)
        network, known = start.model, start.facts
    else:
        known = CheckpointFacts(
            kind="float",
            model=model or DEFAULT_MODEL,
            labels=dataset.classes,
            preprocessing=Preprocessing.square(image_size or default_image_size(dataset)),
        )
        network = create_model(known.model, num_classes=len(known.labels))
        check_output_width(network, known.preprocessing, len(known.labels), source=f"--model {known.model}")
    facts = CheckpointFacts(
        kind="float",
        model=known.model,
        labels=known.labels,
        preprocessing=known.preprocessing,
        dataset=dataset_facts(dataset, split_seed=split_seed),
        parent_sha256=start.sha256 if start else None,
    )
    label_map = map_labels(dataset, facts.labels)
    trained = train(
        network,
        dataset,
        facts.preprocessing,
        schedule,
        objective=LabelObjective(label_map, label_smoothing=schedule.label_smoothing),
        label_map=label_map,
        output=output,
        settings_digest=settings_digest("fit", schedule, facts, amp=execution.amp, workers=workers.count),
        resume=resume,
        workers=workers,
        execution=execution,
        observer=observer,
    )
    return finish(
        output, trained, schedule, facts, images=len(dataset.split("train")), started=started, workers=workers
    )


def settings_digest(command: str, schedule: Schedule, facts: CheckpointFacts, **more: str | float | None) -> str:
    """Return a digest of everything that a resumed run must have in common with the interrupted one."""
    settings: dict[str, Any] = {
        "command": command,
        "schedule": schedule.model_dump(mode="json"),
        "facts": facts.model_dump(mode="json"),
        **more,
    }
    return sha256_bytes(json.dumps(settings, sort_keys=True).encode())
