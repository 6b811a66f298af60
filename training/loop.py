"""The epoch loop that ``fit`` and ``qat`` share: steps, dev score after every epoch, best kept, resumable."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from training.checkpoint import CheckpointFacts, DevMetrics, SavedCheckpoint, TrainingFacts, save_checkpoint
from training.data import TrainingBatches
from training.predict import predictor
from training.resume import ResumeState, delete_resume, load_resume, resume_path_for, save_resume
from training.schedule import Schedule
from trtdeploy.datasets import Dataset, Split
from trtdeploy.errors import LedgerError, TrainingError
from trtdeploy.evaluation import evaluate
from trtdeploy.files import atomic_write
from trtdeploy.preprocessing import Preprocessing

EVALUATION_BATCH = 128
_PIXELS_WORTH_THREADS = 1 << 17
"""Pixels per batch below which one thread does the work: 128 images of 32x32."""


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
class Trained:
    """What training returns; ``history`` has one entry per epoch."""

    best: Best
    epochs: int
    steps: int
    history: tuple[dict[str, Any], ...]


def metrics_path_for(output: Path) -> Path:
    """Return the file of one JSON line per epoch beside ``output``."""
    return output.with_name(f"{output.stem}.metrics.jsonl")


def score(model: nn.Module, split: Split, preprocessing: Preprocessing, label_map: Sequence[int]) -> DevMetrics:
    """Return top-1 and mean cross-entropy of a network on a split.

    Raises:
        LedgerError: An answer is not finite.
    """
    outputs = evaluate(predictor(model), split, preprocessing, label_map=label_map, batch_size=EVALUATION_BATCH).outputs
    loss = nn.functional.cross_entropy(torch.from_numpy(outputs.logits), torch.from_numpy(outputs.labels))
    return DevMetrics(top1=outputs.top1.value, loss=float(loss), n=len(outputs.ids))


def train(
    model: nn.Module,
    dataset: Dataset,
    preprocessing: Preprocessing,
    schedule: Schedule,
    *,
    label_map: Sequence[int],
    output: Path,
    settings_digest: str,
    resume: bool = False,
    count_start: bool = False,
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
        label_map: The model's class index for each class of the dataset.
        output: The checkpoint that the caller will write; names the files beside it.
        settings_digest: Names everything that a resumed run must have in common with the interrupted one.
        resume: Continue from the file beside ``output``.
        count_start: Let the network as given compete for the best.
        observer: Is told how it goes.

    Raises:
        TrainingError: The loss, or an answer on dev, is not finite.
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
    )
    steps = batches.steps_per_epoch * schedule.epochs
    steps = min(steps, schedule.max_steps or steps)
    epochs = math.ceil(steps / batches.steps_per_epoch)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = _optimizer(model, schedule)
    torch.manual_seed(schedule.seed)
    run = _Run()
    resume_path = resume_path_for(output)
    if resume:
        run = _restore(load_resume(resume_path, settings_digest), model, optimizer)
    elif count_start:
        dev = _score_or_fail(model, dataset, preprocessing, label_map, epoch=0)
        run.best = Best(epoch=0, dev=dev, state=_copy(model))
    _, height, width = preprocessing.sample_shape
    try:
        while run.epoch < epochs:
            start = time.perf_counter()
            first_step = run.step
            with _threads_for(batches.batch_size * height * width):
                loss = _one_epoch(
                    model, optimizer, batches, schedule, run, steps=steps, epochs=epochs, observer=observer
                )
            training_s = time.perf_counter() - start
            dev = _score_or_fail(model, dataset, preprocessing, label_map, epoch=run.epoch)
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
            # before the state: whoever finds the state of an epoch finds its metrics too
            atomic_write(metrics_path_for(output), "".join(json.dumps(line) + "\n" for line in run.history))
            if run.epoch < epochs:
                save_resume(resume_path, _freeze(run, model, optimizer, settings_digest))
            observer.epoch(metrics)
    except KeyboardInterrupt as error:
        kept = run.history[-1]["epoch"] if run.history and resume_path.exists() else 0
        advice = (
            f"epoch {kept} of {epochs} is kept in {resume_path}; run the same command with --resume to go on."
            if kept
            else "no epoch was complete, so nothing is kept."
        )
        raise TrainingInterrupted(f"Interrupted: {advice}") from error
    assert run.best is not None  # there was at least one epoch
    return Trained(best=run.best, epochs=epochs, steps=run.step, history=tuple(run.history))


def finish(
    output: Path, trained: Trained, schedule: Schedule, facts: CheckpointFacts, *, images: int, started: float
) -> SavedCheckpoint:
    """Write the best state as a checkpoint, then delete the resume file that led to it.

    Args:
        output: Where to.
        trained: What ``train`` returned.
        schedule: How it was trained.
        facts: What else the checkpoint says.
        images: Size of the training split.
        started: ``time.perf_counter()`` when the work began.
    """
    facts = facts.model_copy(
        update={
            "training": TrainingFacts(
                images=images,
                epochs=trained.epochs,
                steps=trained.steps,
                batch_size=schedule.batch_size,
                learning_rate=schedule.learning_rate,
                seed=schedule.seed,
                best_epoch=trained.best.epoch,
            ),
            "dev": trained.best.dev,
        }
    )
    sha256 = save_checkpoint(output, trained.best.state, facts)
    delete_resume(resume_path_for(output))
    return SavedCheckpoint(path=output, sha256=sha256, facts=facts, seconds=time.perf_counter() - started)


def _one_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: TrainingBatches,
    schedule: Schedule,
    run: _Run,
    *,
    steps: int,
    epochs: int,
    observer: Observer,
) -> float:
    """Train for one epoch or until ``steps`` are done; return the mean loss and move ``run`` on."""
    losses: list[float] = []
    epoch = run.epoch + 1
    step = run.step
    frozen: bool | None = None
    start = time.perf_counter()
    for images, labels in batches.epoch(epoch, steps=steps - step):
        freeze = step >= schedule.freeze_batch_norm_after * steps
        if freeze != frozen:
            _set_modes(model, schedule, freeze_batch_norm=freeze)
            frozen = freeze
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate_at(step, steps)
        loss = nn.functional.cross_entropy(model(images), labels, label_smoothing=schedule.label_smoothing)
        losses.append(float(loss.detach()))
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
        images_per_s = len(losses) * batches.batch_size / (time.perf_counter() - start)
        observer.step(epoch=epoch, epochs=epochs, step=step, steps=steps, loss=losses[-1], images_per_s=images_per_s)
    run.epoch, run.step = epoch, step
    return float(np.mean(losses))


@contextmanager
def _threads_for(pixels_per_batch: int) -> Iterator[None]:
    """Use one thread where operations are so small that several mostly wait for each other.

    EfficientNet-B0 on 32 images of 32x32 gains nothing from a second core and loses a factor of two where that core is
    shared. Then also the same seed gives the same weights on any number of cores.
    """
    threads = torch.get_num_threads()
    if pixels_per_batch < _PIXELS_WORTH_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _set_modes(model: nn.Module, schedule: Schedule, *, freeze_batch_norm: bool) -> None:
    model.train()
    for module in model.modules():
        is_batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        # A leaf with a probability of dropping something is a regulariser: nn.Dropout and its kin, and every usual
        # definition of stochastic depth.
        is_regulariser = not any(module.children()) and any(
            isinstance(getattr(module, name, None), float) for name in ("p", "drop_probability", "drop_prob")
        )
        if (is_batch_norm and freeze_batch_norm) or (is_regulariser and not schedule.regularise):
            module.eval()


def _optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise TrainingError("The network has no parameter that can be trained.")
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, fused=True)


def _score_or_fail(
    model: nn.Module, dataset: Dataset, preprocessing: Preprocessing, label_map: Sequence[int], *, epoch: int
) -> DevMetrics:
    try:
        return score(model, dataset.split("dev"), preprocessing, label_map)
    except LedgerError as error:
        raise TrainingError(
            f"After epoch {epoch} the network's answers on dev are not finite; no checkpoint is written.",
            hint="Lower --learning-rate.",
        ) from error


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def _freeze(run: _Run, model: nn.Module, optimizer: torch.optim.Optimizer, digest: str) -> ResumeState:
    assert run.best is not None  # called after an epoch
    return ResumeState(
        digest=digest,
        epoch=run.epoch,
        step=run.step,
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        torch_rng=torch.get_rng_state(),
        best_epoch=run.best.epoch,
        best_dev=run.best.dev.model_dump(),
        best_model=run.best.state,
        history=run.history,
    )


def _restore(state: ResumeState, model: nn.Module, optimizer: torch.optim.Optimizer) -> _Run:
    model.load_state_dict(state.model)
    optimizer.load_state_dict(state.optimizer)
    torch.set_rng_state(state.torch_rng)
    best = Best(epoch=state.best_epoch, dev=DevMetrics.model_validate(state.best_dev), state=state.best_model)
    return _Run(best=best, epoch=state.epoch, step=state.step, history=list(state.history))
