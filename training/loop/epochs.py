"""The epoch loop that ``fit`` and ``qat`` share: steps, dev score after every epoch, best kept, resumable."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from training.checkpoints.checkpoint import CheckpointFacts, DevMetrics, SavedCheckpoint, TrainingFacts, save_checkpoint
from training.loop.data import TrainingBatches
from training.loop.distributed import Workers
from training.loop.objective import Objective
from training.loop.objective import score as score
from training.loop.optimization import Execution, make_optimizer, set_learning_rate, set_modes, threads_for
from training.loop.resume import ResumeState, delete_resume, load_resume, resume_path_for, save_resume
from training.loop.schedule import Schedule
from training.quantization.range_learning import LearnedRanges
from trtdeploy.data import Dataset
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import LedgerError, TrainingError
from trtdeploy.files import atomic_write

_ALONE = Workers()
_ON_CPU = Execution()
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Observer(Protocol):
    """Is told how training goes; the command line shows it."""

    def step(self, *, epoch: int, epochs: int, step: int, steps: int, loss: float, images_per_s: float) -> None:
        """Report one step; ``step`` counts from 1 over all epochs."""

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Report a finished epoch: the line that the metrics file gets."""


class _Nobody:
    def step(self, *, epoch: int, epochs: int, step: int, steps: int, loss: float, images_per_s: float) -> None:
        pass

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        pass


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C during training; the message says what is kept and how to go on."""


@dataclass
class Best:
    """The best state so far by dev accuracy, ties by dev loss; epoch 0 is what training started from."""

    epoch: int
    dev: DevMetrics
    state: dict[str, Tensor]


@dataclass
class _Run:
    """Where training is."""

    best: Best | None = None
    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Training:
    """What stays the same during training; with several workers, ``parallel`` is called in place of ``model``."""

    model: nn.Module
    parallel: nn.Module
    optimizer: torch.optim.Optimizer
    batches: TrainingBatches
    schedule: Schedule
    objective: Objective
    ranges: LearnedRanges | None
    workers: Workers
    execution: Execution
    observer: Observer
    steps: int
    epochs: int


@dataclass(frozen=True)
class Trained:
    """What training returns; ``history`` has one entry per epoch, ``batch_size`` is that of all processes."""

    best: Best
    epochs: int
    steps: int
    batch_size: int
    history: tuple[dict[str, Any], ...]


def metrics_path_for(output: Path) -> Path:
    """Return the file of one JSON line per epoch beside ``output``."""
    return output.with_name(f"{output.stem}.metrics.jsonl")


def train(
    model: nn.Module,
    dataset: Dataset,
    preprocessing: Preprocessing,
    schedule: Schedule,
    *,
    objective: Objective,
    label_map: Sequence[int],
    output: Path,
    settings_digest: str,
    ranges: LearnedRanges | None = None,
    resume: bool = False,
    start_dev: DevMetrics | None = None,
    workers: Workers = _ALONE,
    execution: Execution = _ON_CPU,
    observer: Observer | None = None,
) -> Trained:
    """Train on the split ``train`` and keep the state that scores best on ``dev``.

    After every epoch the whole state is written beside ``output``, and one line of metrics. A run that is resumed
    from there ends with the same weights as one that was never interrupted.

    Args:
        model: The network; it is changed.
        dataset: Labelled images.
        preprocessing: How images become model input.
        schedule: How to train.
        objective: What is minimised, and what decides which epoch is the best.
        label_map: The model's class index for each class of the dataset.
        output: The checkpoint that the caller will write; names the files beside it. Each process reads them, so on
            several machines they lie in a folder that all of them see.
        settings_digest: Names everything that a resumed run must have in common with the interrupted one.
        ranges: Those of the network that move; none if None.
        resume: Continue from the file beside ``output``.
        start_dev: Score on dev of the network as given, which then competes for the best; None if it does not.
        workers: The processes that train together.
        execution: Device and precision.
        observer: Is told how it goes.

    Raises:
        TrainingError: The loss, or an answer on dev, is not finite, or another process ended.
        CheckpointError: There is nothing to resume, or it belongs to other settings.
        TrainingInterrupted: Ctrl-C.
    """
    observer = observer or _Nobody()
    batches = TrainingBatches(
        dataset.split("train"),
        preprocessing,
        batch_size=schedule.batch_size,
        seed=schedule.seed,
        augmentation=schedule.augmentation,
        label_map=label_map,
        workers=workers,
    )
    steps = batches.steps_per_epoch * schedule.epochs
    steps = min(steps, schedule.max_steps or steps)
    epochs = math.ceil(steps / batches.steps_per_epoch)
    model.to(execution.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, schedule, ranges)
    example = torch.zeros(1, *preprocessing.sample_shape, device=execution.device)
    parallel = workers.parallel(model, ranges.parameters() if ranges else [], example=example)
    torch.manual_seed(schedule.seed)
    training = _Training(
        model, parallel, optimizer, batches, schedule, objective, ranges, workers, execution, observer, steps, epochs
    )
    run = _Run()
    resume_path = resume_path_for(output)
    if resume:
        run = _restore(load_resume(resume_path, settings_digest), training)
    elif start_dev is not None:
        run.best = Best(epoch=0, dev=start_dev, state=_copy(model))
    _, height, width = preprocessing.sample_shape
    share = batches.batch_size // workers.count

    def kept() -> str:
        epoch = run.history[-1]["epoch"] if run.history and resume_path.exists() else 0
        if not epoch:
            return "no epoch was complete, so nothing is kept."
        return f"epoch {epoch} of {epochs} is kept in {resume_path}; run the same command with --resume to go on."

    try:
        while run.epoch < epochs:
            start = time.perf_counter()
            first_step = run.step
            with workers.watched(kept), threads_for(share * height * width):
                loss = _one_epoch(training, run)
            training_s = time.perf_counter() - start
            dev = score_or_fail(model, dataset, preprocessing, objective, epoch=run.epoch)
            if run.best is None or (dev.top1, -dev.loss) > (run.best.dev.top1, -run.best.dev.loss):
                run.best = Best(epoch=run.epoch, dev=dev, state=_copy(model))
            metrics = {
                "epoch": run.epoch,
                "epochs": epochs,
                "step": run.step,
                "loss": loss,
                "dev_top1": dev.top1,
                "dev_loss": dev.loss,
                "best_epoch": run.best.epoch,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "images_per_s": round((run.step - first_step) * batches.batch_size / training_s, 1),
                "seconds": round(time.perf_counter() - start, 2),
            }
            run.history.append(metrics)
            if workers.is_main:
                # before the state: whoever finds the state of an epoch finds its metrics too
                atomic_write(metrics_path_for(output), "".join(json.dumps(line) + "\n" for line in run.history))
                if run.epoch < epochs:
                    save_resume(resume_path, _freeze(run, training, settings_digest))
                observer.epoch(metrics)
    except KeyboardInterrupt as error:
        raise TrainingInterrupted(f"Interrupted: {kept()}") from error
    assert run.best is not None  # there was at least one epoch
    return Trained(
        best=run.best, epochs=epochs, steps=run.step, batch_size=batches.batch_size, history=tuple(run.history)
    )


def finish(
    output: Path,
    trained: Trained,
    schedule: Schedule,
    facts: CheckpointFacts,
    *,
    images: int,
    started: float,
    extra: Mapping[str, Any] = _NOTHING,
    workers: Workers = _ALONE,
) -> SavedCheckpoint:
    """Write the best state as a checkpoint, then delete the resume file that led to it.

    Args:
        output: Where to.
        trained: What ``train`` returned.
        schedule: How it was trained.
        facts: What else the checkpoint says.
        images: Size of the training split.
        started: ``time.perf_counter()`` when the work began.
        extra: More of ``TrainingFacts``.
        workers: The processes that trained together; only one writes.
    """
    facts = facts.model_copy(
        update={
            "training": TrainingFacts(
                images=images,
                epochs=trained.epochs,
                steps=trained.steps,
                batch_size=trained.batch_size,
                learning_rate=schedule.learning_rate,
                seed=schedule.seed,
                best_epoch=trained.best.epoch,
                **extra,
            ),
            "dev": trained.best.dev,
        }
    )
    sha256 = ""
    if workers.is_main:
        sha256 = save_checkpoint(output, trained.best.state, facts)
        delete_resume(resume_path_for(output))
    return SavedCheckpoint(
        path=output, sha256=str(workers.from_main(sha256)), facts=facts, seconds=time.perf_counter() - started
    )


def _one_epoch(training: _Training, run: _Run) -> float:
    """Train for one epoch or until all steps are done; return the mean loss and move ``run`` on."""
    schedule, steps, optimizer = training.schedule, training.steps, training.optimizer
    device = training.execution.device
    losses: list[float] = []
    epoch = run.epoch + 1
    step = run.step
    frozen: bool | None = None
    if (
        training.workers.count > 1
    ):  # what each draws at random differs, and follows from the epoch, so it can be resumed
        torch.manual_seed(int(np.random.default_rng([schedule.seed, epoch, training.workers.rank]).integers(2**62)))
    start = time.perf_counter()
    for images, labels in training.batches.epoch(epoch, steps=steps - step):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        freeze = step >= schedule.freeze_batch_norm_after * steps
        if freeze != frozen:
            set_modes(training.model, schedule, freeze_batch_norm=freeze)
            frozen = freeze
        set_learning_rate(optimizer, schedule.learning_rate_at(step, steps))
        with training.execution.autocast():
            logits = training.parallel(images.clone())  # a network may write into its input; a teacher reads it too
            loss = training.objective.loss(_scores(logits, training.model), images, labels)
        losses.append(training.workers.mean(loss))
        step += 1
        if not math.isfinite(losses[-1]):
            raise TrainingError(
                f"The loss is {losses[-1]} at epoch {epoch}, step {step}; no checkpoint is written.",
                hint=f"Lower --learning-rate (it is {schedule.learning_rate:g}), and evaluate the checkpoint that "
                "training started from, if there is one.",
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if training.ranges:
            training.ranges.write_back()
        if training.workers.is_main:
            images_per_s = len(losses) * training.batches.batch_size / (time.perf_counter() - start)
            training.observer.step(
                epoch=epoch, epochs=training.epochs, step=step, steps=steps, loss=losses[-1], images_per_s=images_per_s
            )
    run.epoch, run.step = epoch, step
    return float(np.mean(losses))


def _scores(outputs: object, model: nn.Module) -> Tensor:
    """Return class scores in float32.

    Raises:
        TrainingError: In training the network returns something else.
    """
    if not isinstance(outputs, Tensor):
        raise TrainingError(
            f"In training {type(model).__name__} returns {type(outputs).__name__}; expected one tensor of class scores "
            "(N, classes). A network with auxiliary heads returns theirs, too.",
            hint="Let it return the scores alone in training, or train it in a loop of your own.",
        )
    return outputs.float()


def score_or_fail(
    model: nn.Module, dataset: Dataset, preprocessing: Preprocessing, objective: Objective, *, epoch: int
) -> DevMetrics:
    """Score a network on dev after an epoch; 0 is what training starts from.

    Every process scores all of dev, which on several machines takes no longer than waiting for one of them.

    Raises:
        TrainingError: An answer is not finite.
    """
    try:
        return objective.score(model, dataset.split("dev"), preprocessing)
    except LedgerError as error:
        if epoch == 0:
            raise TrainingError(
                "The answers on dev of the network that training starts from are not finite.",
                hint="Evaluate the float checkpoint that it was made from.",
            ) from error
        raise TrainingError(
            f"After epoch {epoch} the network's answers on dev are not finite; no checkpoint is written.",
            hint="Lower --learning-rate.",
        ) from error


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def _freeze(run: _Run, training: _Training, digest: str) -> ResumeState:
    assert run.best is not None  # called after an epoch
    return ResumeState(
        digest=digest,
        epoch=run.epoch,
        step=run.step,
        model=training.model.state_dict(),
        optimizer=training.optimizer.state_dict(),
        ranges=training.ranges.state() if training.ranges else {},
        torch_rng=torch.get_rng_state(),
        best_epoch=run.best.epoch,
        best_dev=run.best.dev.model_dump(),
        best_model=run.best.state,
        history=run.history,
    )


def _restore(state: ResumeState, training: _Training) -> _Run:
    training.model.load_state_dict(state.model)
    training.optimizer.load_state_dict(state.optimizer)
    if training.ranges:
        training.ranges.load_state(state.ranges)
    torch.set_rng_state(state.torch_rng)
    best = Best(epoch=state.best_epoch, dev=DevMetrics.model_validate(state.best_dev), state=state.best_model)
    return _Run(best=best, epoch=state.epoch, step=state.step, history=list(state.history))
