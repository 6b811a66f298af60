"""The steps of ``training auto``, cheapest first."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from training.auto.decision import Choice, Decision, Trial
from training.auto.folder import claim_folder, kept_when_interrupted
from training.auto.spending import declare_shares
from training.checkpoints.checkpoint import Checkpoint, SavedCheckpoint, load_checkpoint
from training.loop.epochs import Observer
from training.loop.optimization import Execution
from training.loop.resume import delete_resume, resume_path_for
from training.loop.schedule import Schedule
from training.onnx_export import export_checkpoint
from training.predict import predictor
from training.ptq.calibrate import calibrate
from training.qat.fine_tuning import default_schedule, networks_compared, qat
from training.quantization import QuantizationSpec, prepare
from training.recording import score_split
from training.sensitivity import Sensitivity, measure_sensitivity
from trtdeploy.calibration import METHODS
from trtdeploy.data import Dataset
from trtdeploy.errors import CheckpointError, UsageError
from trtdeploy.files import atomic_write, sha256_bytes, sha256_file
from trtdeploy.ledger import StageOutputs
from trtdeploy.statistics import compare_paired, non_inferiority, samples_needed

_ON_CPU = Execution()
_log = logging.getLogger(__name__)

_LEFT_OUT = (1, 2, 4)
"""How many of the worst layers stay in float; the fewest that halve the divergence, else the most."""
_TRAINED = ("QAT", "QAT + distillation")
_STEPS = ("PTQ", "PTQ + bias correction", "partial quantization", *_TRAINED)

Say = Callable[[str], None]


class _Done(BaseModel):
    """Kept beside what a finished step made: the settings that it was made with, and what it took."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: str
    sha256: str
    seconds: float


def decide(
    dataset: Dataset,
    start: Checkpoint,
    folder: Path,
    *,
    max_drop: float,
    spec: QuantizationSpec | None = None,
    schedule: Schedule | None = None,
    split_seed: int = 0,
    execution: Execution = _ON_CPU,
    say: Say | None = None,
    observer: Observer | None = None,
) -> Decision:
    """Find the cheapest quantized network whose drop is shown to be inside the budget, and export it.

    What an earlier run left in ``folder`` is not made again.

    Args:
        dataset: Labelled images. Variants are chosen on the split ``calibration``, the proof is on ``dev``, and
            ``test`` is looked at once, after the choice.
        start: A float checkpoint.
        folder: Gets the checkpoints, ``model.onnx``, ``decision.json`` and ``decision.md``.
        max_drop: The budget in percentage points.
        spec: What every candidate is quantized for, and what stays in float in all of them; the defaults if None.
        schedule: Of QAT; its default if None.
        split_seed: The one that the dataset was opened with.
        execution: The device of all that is run, and the precision of QAT; the rest computes in float32.
        say: Told what happens.
        observer: Told how training goes.

    Raises:
        UsageError: The checkpoint is not float, the budget makes no sense, a pattern matches no layer, or ``folder``
            holds a run with other settings.
        QuantizationError: Nothing can be quantized.
        TrainingInterrupted: Ctrl-C.
    """
    if not 0 < max_drop < 100:
        raise UsageError(f"--max-drop {max_drop:g} is not between 0 and 100 percentage points.")
    if start.facts.kind != "float":
        raise UsageError(f"{start.path} is quantized already ({start.facts.kind}); auto takes a float checkpoint.")
    spec, schedule = spec or QuantizationSpec(), schedule or default_schedule(dataset)
    settings: dict[str, Any] = {
        "checkpoint": start.sha256,
        "data": dataset.fingerprint,
        "quantization": spec.model_dump(mode="json"),
        "schedule": schedule.model_dump(mode="json"),
    }
    if execution.amp:
        settings["amp"] = True
    example = torch.zeros(1, *start.facts.preprocessing.sample_shape)
    prepare(deepcopy(start.model), example, spec)  # refuses what cannot be done before the folder is claimed
    claim_folder(folder, settings)
    compared = networks_compared(schedule)
    declared = declare_shares({step: compared if step in _TRAINED else 1 for step in _STEPS})
    confidences = {share.step: share.confidence for share in declared}
    search = _Search(dataset, start, folder, spec, schedule, split_seed, execution, observer)
    exact = search.answers(start.path, "dev")
    with kept_when_interrupted(folder):
        trials = _try_in_turn(search, exact, confidences, max_drop=max_drop, say=say)
    met = trials[-1].proof.shown
    best = trials[-1] if met else max(trials, key=lambda trial: trial.difference.difference.value)
    chosen = folder / best.checkpoint
    export_checkpoint(load_checkpoint(chosen), folder / "model.onnx", dataset)
    decision = Decision(
        max_drop=max_drop,
        met=met,
        chosen=chosen.name,
        model=start.facts.model,
        declared=declared,
        float_top1=exact.top1,
        trials=tuple(trials),
        not_tried=tuple(step for step in _STEPS if step not in {trial.step for trial in trials}),
        test=compare_paired(search.answers(start.path, "test").correct, search.answers(chosen, "test").correct),
        onnx="model.onnx",
    )
    atomic_write(folder / "decision.json", json.dumps(decision.model_dump(mode="json"), indent=2) + "\n")
    atomic_write(folder / "decision.md", decision.page())
    return decision


def _try_in_turn(
    search: _Search, exact: StageOutputs, confidences: Mapping[str, float], *, max_drop: float, say: Say | None
) -> list[Trial]:
    """Put one candidate after the other to the proof, until one is shown to be inside the budget."""
    trials: list[Trial] = []
    for step, detail, path, seconds, variants in search.candidates():
        began = time.perf_counter()
        outputs = search.answers(path, "dev")
        change = compare_paired(exact.correct, outputs.correct)
        confidence = confidences[step]
        counts = {"gained": change.gained, "lost": change.lost, "n": change.n, "max_drop": max_drop}
        trial = Trial(
            step=step,
            detail=detail,
            checkpoint=path.name,
            top1=outputs.top1,
            difference=change,
            proof=non_inferiority(**counts, confidence=confidence),  # type: ignore[arg-type]
            samples_needed=samples_needed(**counts, confidence=confidence),  # type: ignore[arg-type]
            seconds=round(seconds + time.perf_counter() - began, 1),
            variants=variants,
        )
        trials.append(trial)
        if say:
            say(
                f"{step} ({detail}): {change.difference.format()} points against float, "
                f"{'shown' if trial.proof.shown else 'not shown'} to be inside {max_drop:g}"
            )
        if trial.proof.shown:
            break
    return trials


class _Search:
    def __init__(
        self,
        dataset: Dataset,
        start: Checkpoint,
        folder: Path,
        spec: QuantizationSpec,
        schedule: Schedule,
        split_seed: int,
        execution: Execution,
        observer: Observer | None,
    ) -> None:
        self._dataset, self._start, self._folder, self._spec = dataset, start, folder, spec
        self._schedule, self._split_seed, self._observer = schedule, split_seed, observer
        self._execution = execution

    def _load(self, path: Path) -> Checkpoint:
        """Load a checkpoint anew; the one to start from may be another program's, which does not say what it is."""
        return load_checkpoint(path, like=self._start.facts)

    def answers(self, path: Path, split: str) -> StageOutputs:
        checkpoint = self._load(path)
        checkpoint.model.to(self._execution.device)
        return score_split(predictor(checkpoint.model), checkpoint.facts, self._dataset, split=split).outputs

    def candidates(self) -> Iterator[tuple[str, str, Path, float, tuple[Choice, ...]]]:
        """Yield step, settings, checkpoint, seconds and variants; each is made when it is asked for."""
        exact = self.answers(self._start.path, "calibration")
        variants = [self._variant(method, exact, method=method) for method in METHODS]
        best, path = min(variants, key=lambda item: item[0].kl)
        yield "PTQ", best.name, path, _total(variants), tuple(item for item, _ in variants)
        options: dict[str, Any] = {"method": best.name}
        corrected, corrected_path = self._variant(f"{best.name}-corrected", exact, **options, bias_correction=True)
        yield "PTQ + bias correction", best.name, corrected_path, corrected.seconds, ()
        if corrected.kl < best.kl:
            options["bias_correction"], path = True, corrected_path
        found, measured = self._sensitivity(path)
        worst = [row.name for row in found.layers if row.kind == "layer"]
        tried = []
        for count in [count for count in _LEFT_OUT if count < len(worst)]:
            skip = (*self._spec.skip, *map(_literally, worst[:count]))
            tried.append(self._variant(f"without-{count}", exact, **options, skip=skip))
            if tried[-1][0].kl <= found.quantized.kl / 2:
                break
        if tried:
            count = _LEFT_OUT[len(tried) - 1]
            names = f"{best.name}; in float: {', '.join(worst[:count])}"
            choices = tuple(item for item, _ in tried)
            yield "partial quantization", names, tried[-1][1], measured + _total(tried), choices
        yield from self._training(path)

    def _sensitivity(self, path: Path) -> tuple[Sensitivity, float]:
        """Return what each layer of a checkpoint costs, and the seconds that measuring it took."""
        output = self._folder / "sensitivity.json"
        seconds = self._once(
            output,
            {"of": sha256_file(path)},
            lambda: measure_sensitivity(
                load_checkpoint(path), self._dataset, output, split="calibration", device=self._execution.device
            ),
        )
        return Sensitivity.model_validate_json(output.read_text(encoding="utf-8")), seconds

    def _training(self, path: Path) -> Iterator[tuple[str, str, Path, float, tuple[Choice, ...]]]:
        for step, name, taught in zip(_TRAINED, ("qat", "qat-distilled"), (False, True), strict=True):
            output = self._folder / f"{name}.safetensors"
            settings = {"from": sha256_file(path), "schedule": self._schedule.model_dump(mode="json"), "step": step}
            seconds = self._once(output, settings, partial(self._train, path, output, taught=taught))
            yield step, f"from {path.stem}, {self._schedule.epochs} epoch(s)", output, seconds, ()

    def _train(self, path: Path, output: Path, *, taught: bool) -> SavedCheckpoint:
        """Fine-tune a checkpoint; go on where an interrupted run was, unless what it left is of no use."""
        unfinished = resume_path_for(output)
        if unfinished.exists():
            try:
                return self._qat(path, output, taught=taught, resume=True)
            except CheckpointError as error:
                _log.warning("%s It is trained anew.", error.message)
                delete_resume(unfinished)
        return self._qat(path, output, taught=taught, resume=False)

    def _qat(self, path: Path, output: Path, *, taught: bool, resume: bool) -> SavedCheckpoint:
        return qat(
            self._dataset,
            load_checkpoint(path),
            output,
            schedule=self._schedule,
            teacher=self._load(self._start.path) if taught else None,
            split_seed=self._split_seed,
            resume=resume,
            execution=self._execution,
            observer=self._observer,
        )

    def _variant(
        self, name: str, exact: StageOutputs, *, skip: tuple[str, ...] | None = None, **options: Any
    ) -> tuple[Choice, Path]:
        path = self._folder / f"ptq-{name}.safetensors"
        spec = self._spec if skip is None else self._spec.model_copy(update={"skip": skip})
        seconds = self._once(
            path,
            {**options, "spec": spec.model_dump(mode="json")},
            lambda: calibrate(
                self._dataset,
                self._load(self._start.path),
                path,
                spec=spec,
                split_seed=self._split_seed,
                device=self._execution.device,
                **options,
            ),
        )
        divergence = self.answers(path, "calibration").divergence_from(exact).mean
        return Choice(name=str(options["method"]) if skip is None else name, kl=divergence, seconds=seconds), path

    def _once(self, path: Path, settings: dict[str, Any], make: Callable[[], object]) -> float:
        """Make a file unless it is there, made with the same settings; return the seconds that it took."""
        everything = {**settings, "start": self._start.sha256, "data": self._dataset.fingerprint}
        digest = sha256_bytes(json.dumps(everything, sort_keys=True).encode())
        record = path.with_suffix(".step.json")
        if path.is_file() and record.is_file():
            try:
                done = _Done.model_validate_json(record.read_text(encoding="utf-8"))
            except ValidationError:
                done = None
            if done is not None and done.settings == digest and done.sha256 == sha256_file(path):
                return done.seconds
        began = time.perf_counter()
        make()
        done = _Done(settings=digest, sha256=sha256_file(path), seconds=round(time.perf_counter() - began, 1))
        atomic_write(record, done.model_dump_json() + "\n")
        return done.seconds


def _literally(name: str) -> str:
    """Return a pattern that matches only this name."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _total(variants: list[tuple[Choice, Path]]) -> float:
    return sum(choice.seconds for choice, _ in variants)
