"""Quantization-aware training: fine-tune a calibrated network with its quantizers on.

The recipe follows the user guide of pytorch-quantization: start from a calibrated network, anneal a small learning
rate with a cosine to 1% of it, and do not change the ranges meanwhile. Batch norm stays unfused, and its statistics are
frozen for the last third (Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference",
https://arxiv.org/abs/1806.08342, section 3.2.2). Dropout, stochastic depth and label smoothing are off, and images
are not augmented where each is seen about once: so short a run has nothing to gain from them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from training.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointFacts,
    DevMetrics,
    SavedCheckpoint,
    dataset_facts,
    layers_of,
    warn_of_other_splits,
)
from training.loop.augmentation import Augmentation
from training.loop.distributed import Workers
from training.loop.epochs import Observer, finish, score_or_fail, train
from training.loop.fit import settings_digest
from training.loop.objective import LabelObjective, Objective
from training.loop.optimization import Execution
from training.loop.schedule import Schedule
from training.ptq.starting_ranges import StartingRanges, choose_ranges
from training.qat.distillation import Distillation, DistillationSettings, check_teacher
from training.quantization.range_learning import LearnedRanges
from trtdeploy.data import Dataset
from trtdeploy.errors import UsageError
from trtdeploy.ledger.evaluation import map_labels

Ranges = Literal["frozen", "learned"]

DEFAULT_MAX_STEPS = 200
_ALONE = Workers()
_ON_CPU = Execution()
_DISTILLATION = DistillationSettings()
_COMMON: Mapping[str, Any] = MappingProxyType(
    {"weight_decay": 0.01, "warm_up": 0.05, "freeze_batch_norm_after": 2 / 3, "regularise": False}
)


def default_schedule(dataset: Dataset) -> Schedule:
    """Return the schedule of ``qat`` where no option says otherwise: 200 steps of 128 images, or 3 epochs of digits.

    The learning rate is about 1% of that with which the float network is trained, the user guide's rule.
    """
    if dataset.name == "digits":
        return Schedule(epochs=3, batch_size=32, learning_rate=5e-5, augmentation=Augmentation(shift_px=2), **_COMMON)
    steps_per_epoch = max(1, len(dataset.split("train")) // 128)
    return Schedule(
        epochs=-(-DEFAULT_MAX_STEPS // steps_per_epoch),
        max_steps=DEFAULT_MAX_STEPS,
        batch_size=128,
        learning_rate=2e-5,
        **_COMMON,
    )


def networks_compared(schedule: Schedule, *, ranges: Ranges = "learned") -> int:
    """Return how many networks might become what ``qat`` writes, depending on what dev says.

    A run scores about half of them where ranges are learned. But then dev also decides which ranges it starts from, and
    all epochs follow from that: those after the other start would have been the ones to choose among.
    """
    starts = len(get_args(StartingRanges)) if ranges == "learned" else 1
    return starts * (schedule.epochs + 1)


def qat(
    dataset: Dataset,
    start: Checkpoint,
    output: Path,
    *,
    schedule: Schedule,
    ranges: Ranges = "learned",
    teacher: Checkpoint | None = None,
    distillation: DistillationSettings = _DISTILLATION,
    split_seed: int = 0,
    resume: bool = False,
    workers: Workers = _ALONE,
    execution: Execution = _ON_CPU,
    observer: Observer | None = None,
) -> SavedCheckpoint:
    """Fine-tune and write what scores best on the dev split; what it started from competes too.

    Args:
        dataset: Labelled images; without labels that the model knows, where only the teacher counts.
        start: A ``ptq`` checkpoint, or a ``qat`` one to go on from.
        output: The ``.safetensors`` file to write.
        schedule: How to train.
        ranges: Whether they stay as they are or are learned too.
        teacher: A float checkpoint to learn from.
        distillation: How much it counts.
        split_seed: The one that the dataset was opened with.
        resume: Continue an interrupted run.
        workers: The processes that train together.
        execution: Device and precision.
        observer: Is told how it goes.

    Raises:
        UsageError: The start has no ranges, or the teacher does not fit it.
        TrainingError: The loss is no longer finite.
        CheckpointError: There is nothing to resume.
    """
    started = time.perf_counter()
    known = start.facts
    if known.kind == "float":
        raise UsageError(
            f"{start.path} is a float checkpoint; qat starts from a calibrated one.",
            hint="Calibrate it first: trtdeploy train calibrate",
        )
    warn_of_other_splits(start, dataset)
    facts = CheckpointFacts(
        kind="qat",
        model=known.model,
        labels=known.labels,
        preprocessing=known.preprocessing,
        dataset=dataset_facts(dataset, split_seed=split_seed),
        calibration=known.calibration,
        quantization=known.quantization,
        layers=layers_of(start),
        parent_sha256=start.sha256,
    )
    extra: dict[str, Any] = {"ranges": ranges}
    objective: Objective
    if teacher is None or distillation.needs_labels:
        label_map = map_labels(dataset, facts.labels)
    else:
        label_map = [0] * len(dataset.classes)  # is not read
    if teacher is None:
        objective = LabelObjective(label_map, label_smoothing=schedule.label_smoothing)
    else:
        check_teacher(teacher, facts)
        extra |= {
            "teacher_sha256": teacher.sha256,
            "teacher_weight": distillation.weight,
            "teacher_temperature": distillation.temperature,
        }
        network = teacher.model.to(execution.device)
        objective = Distillation(network, distillation, label_map, label_smoothing=schedule.label_smoothing)
    digest = settings_digest("qat", schedule, facts, amp=execution.amp, workers=workers.count, **extra)
    model = start.model.to(execution.device)

    def score() -> DevMetrics:
        return score_or_fail(model, dataset, facts.preprocessing, objective, epoch=0)

    if ranges == "learned":
        images_to_watch = dataset.split("calibration")
        starting, start_dev = choose_ranges(model, images_to_watch, facts.preprocessing, score, workers)
        extra["starting_ranges"] = starting
    else:
        start_dev = score()
    trained = train(
        model,
        dataset,
        facts.preprocessing,
        schedule,
        objective=objective,
        label_map=label_map,
        output=output,
        settings_digest=digest,
        ranges=LearnedRanges(model) if ranges == "learned" else None,
        resume=resume,
        start_dev=start_dev,
        workers=workers,
        execution=execution,
        observer=observer,
    )
    images = len(dataset.split("train"))
    return finish(output, trained, schedule, facts, images=images, started=started, extra=extra, workers=workers)
