"""Signing off a classifier where it runs: accuracy, agreement, latency and throughput, with gates.

The same checks apply to a served model (``trtdeploy.triton.served``) and to a plan in this process.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from trtdeploy.classifiers import onnx_classifier, plan_classifier
from trtdeploy.datasets.dataset import Dataset, Split
from trtdeploy.engine import Engine
from trtdeploy.errors import ServerError, ShapeError, UsageError
from trtdeploy.evaluation import Progress, collect, evaluate, map_labels, median_latency_ms
from trtdeploy.ledger import Ledger, StageOutputs
from trtdeploy.onnxgraph.source import load_source
from trtdeploy.preprocessing import Preprocessing
from trtdeploy.statistics import Interval, percentile
from trtdeploy.tensors import DYNAMIC, Array, TensorSpec

PERCENTILES = (50.0, 90.0, 95.0, 99.0)
_REFERENCE_BATCH = 32
_ROUNDING = 1e-9


class Target(ABC):
    """A classifier that can be asked from several threads at once.

    Attributes:
        stage: The ledger's stage that its answers belong to.
        name: What reports call it.
        version: Its version, where it has one.
        input: Its one input, with the batch dimension.
        max_batch_size: Largest batch of one request; None where there is no limit.
        preprocessing: How images become its input, if it knows.
        labels: Its class names, if it knows.
        source: Where the answers come from, for the ledger.
        timeout_s: How long one request may take at most; None where there is no limit.
    """

    stage: Literal["plan", "served"]
    name: str
    version: str
    input: TensorSpec
    max_batch_size: int | None
    preprocessing: Preprocessing | None
    labels: tuple[str, ...] | None
    source: dict[str, Any]
    timeout_s: float | None = None

    @abstractmethod
    def scores(self, batch: Array) -> Array:
        """Return the class scores of a batch of model input."""


class PlanTarget(Target):
    """A loaded plan in this process."""

    stage = "plan"

    def __init__(self, engine: Engine, path: str | Path) -> None:
        manifest = engine.manifest
        self._predict = plan_classifier(engine)
        self.name = Path(path).name
        self.version = ""
        self.input = engine.inputs[0]
        self.max_batch_size = None
        self.preprocessing = manifest.preprocessing
        self.labels = manifest.labels
        self.source = {
            "file": Path(path).name,
            "sha256": manifest.plan_sha256,
            "runtime": f"{manifest.runtime.name} {manifest.runtime.version}",
        }

    def scores(self, batch: Array) -> Array:
        return self._predict(batch)


class ValidationOptions(BaseModel):
    """What to check, and how hard to ask.

    Attributes:
        preprocessing: How images become model input; what the target carries if None.
        reference: An ONNX file that is run here on the same inputs, to compare answers with.
        max_drop: Largest allowed drop of top-1 against the baseline, in percentage points.
        min_agreement: Smallest allowed agreement with the reference, in percent.
        batch_size: Samples per request.
        concurrency: Requests in flight.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    preprocessing: Preprocessing | None = None
    reference: Path | None = None
    max_drop: float | None = None
    min_agreement: float | None = Field(default=None, ge=0, le=100)
    batch_size: int = Field(default=1, ge=1)
    concurrency: int = Field(default=4, ge=1)


class Gate(BaseModel):
    """One condition of a release.

    Attributes:
        name: What is limited.
        value: What was measured.
        limit: What is allowed.
        passed: Whether it holds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    value: float
    limit: float
    passed: bool


class ValidationReport(BaseModel):
    """The outcome of a validation.

    Attributes:
        name: What answered.
        version: Its version, where it has one.
        n: Samples sent.
        top1: Correct answers in percent.
        baseline: What the accuracy is compared with, and its top-1 in percent.
        drop: Baseline minus measured, in percentage points.
        reference: What the answers are compared with.
        agreement: Percent of samples with the reference's answer.
        latency_ms: Percentiles of the time of one request, with 95% intervals.
        throughput_per_s: Samples per second, preprocessing included.
        batch_size: Samples per request.
        concurrency: Requests in flight.
        gates: The conditions that were asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    version: str
    n: int
    top1: Interval
    baseline: dict[str, Any] | None
    drop: float | None
    reference: str | None
    agreement: float | None
    latency_ms: dict[str, Interval]
    throughput_per_s: float
    batch_size: int
    concurrency: int
    gates: tuple[Gate, ...]

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(gate.passed for gate in self.gates)


@dataclass(frozen=True)
class Answers:
    """What a target answered to a split, in order, and how long each request took."""

    outputs: StageOutputs
    latencies_ms: NDArray[np.float64]
    seconds: float


@dataclass(frozen=True)
class _Comparison:
    """What the answers are held against."""

    baseline: dict[str, Any] | None
    reference: str | None
    expected: StageOutputs | None


def validate(
    target: Target,
    dataset: Dataset,
    options: ValidationOptions,
    *,
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> ValidationReport:
    """Send the test split of a dataset to a target and check what comes back.

    Args:
        target: Who is asked.
        dataset: Labelled images.
        options: What to check.
        ledger: Where to record the target's stage. Its ``float`` stage is the baseline of the drop, and its ``onnx``
            stage is what answers are compared with, where there is no ``reference``.
        progress: Called with (samples done, samples in all).

    Returns:
        The report; a gate that does not hold is in it, not raised.

    Raises:
        ServerError: The server does not answer, or died meanwhile. The ledger is as it was.
        UsageError: A gate was asked for without anything to compare with.
        ShapeError: The target does not take batches of these images.
        DataError: An image cannot be read, or the dataset's classes are not the model's.
        LedgerError: An answer is not finite, or the ledger belongs to other samples.
    """
    preprocessing = options.preprocessing or target.preprocessing
    if preprocessing is None:
        raise UsageError(
            f"{target.name} says nothing about preprocessing.",
            hint="Give --preprocessing FILE.json, or use a model whose ONNX metadata carries it.",
        )
    recorded = ledger.stages if ledger is not None and ledger.path.exists() else {}
    _check_comparable(options, float_stage="float" in recorded, onnx_stage="onnx" in recorded)
    label_map = map_labels(dataset, target.labels) if target.labels is not None else None
    split = dataset.split("test")
    _check_interface(target, preprocessing, options.batch_size)
    # alone, before the load: what one caller sees, comparable with the other stages of the ledger
    one = preprocessing.normalise(split.pixels(preprocessing, [0]))
    latency_ms = median_latency_ms(lambda: target.scores(one))
    against = _comparison(target, options, ledger, split, preprocessing, label_map)
    answers = ask(
        target,
        split,
        preprocessing,
        label_map=label_map,
        batch_size=options.batch_size,
        concurrency=options.concurrency,
        progress=progress,
    )
    report = _report(target, answers, against, options)
    if ledger is not None:
        ledger.record(
            target.stage,
            answers.outputs,
            seconds=answers.seconds,
            source=target.source,
            dataset={"name": Path(dataset.name).name, "fingerprint": dataset.fingerprint},
            latency_ms=latency_ms,
        )
    return report


def ask(
    target: Target,
    split: Split,
    preprocessing: Preprocessing,
    *,
    label_map: Sequence[int] | None = None,
    batch_size: int = 1,
    concurrency: int = 4,
    progress: Progress | None = None,
) -> Answers:
    """Send a split with several requests in flight; every answer is kept under the number of its request.

    Raises:
        ServerError: A request failed; the first failure ends the run.
        TrtDeployError: Whatever else the target or the dataset raises.
    """
    starts = range(0, len(split), batch_size)
    answers: list[Array | None] = [None] * len(starts)
    latencies = np.full(len(starts), np.nan)
    work: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(starts)):
        work.put(number)
    failures: list[Exception] = []
    finished = threading.Semaphore(0)
    stopping = threading.Event()

    def send_until_empty() -> None:
        while not stopping.is_set():
            try:
                number = work.get_nowait()
            except queue.Empty:
                return
            try:
                indices = range(starts[number], min(starts[number] + batch_size, len(split)))
                batch = preprocessing.normalise(split.pixels(preprocessing, indices))
                start = time.perf_counter()
                scores = target.scores(batch)
                latencies[number] = 1e3 * (time.perf_counter() - start)
                if len(scores) != len(batch):
                    raise ServerError(f"{target.name} answered {len(scores)} of {len(batch)} samples of a request.")
                answers[number] = scores.reshape(len(batch), -1)
            except Exception as error:  # whatever it is, the caller's thread raises it
                failures.append(error)
                stopping.set()
            finally:
                finished.release()

    begin = time.perf_counter()
    threads = [threading.Thread(target=send_until_empty, daemon=True) for _ in range(min(concurrency, len(starts)))]
    for thread in threads:
        thread.start()
    try:
        done = 0
        while done < len(starts) and not stopping.is_set():
            if finished.acquire(timeout=0.2):
                done += 1
                if progress:
                    progress(min(done * batch_size, len(split)), len(split))
    finally:
        # also on Ctrl-C: no thread may go on using a connection that is about to be closed
        stopping.set()
        for thread in threads:
            thread.join()
    seconds = time.perf_counter() - begin
    if failures:
        raise _with_count(failures[0], answered=sum(answer is not None for answer in answers), total=len(starts))
    scores = [answer for answer in answers if answer is not None]
    return Answers(collect(split, scores, label_map=label_map), latencies, seconds)


def _with_count(error: Exception, *, answered: int, total: int) -> Exception:
    if not isinstance(error, ServerError):
        return error
    return ServerError(
        f"{answered} of {total} requests were answered, then: {error.message}",
        hint=error.hint or "Nothing was recorded. Look at the server's log.",
        log_lines=error.log_lines,
    )


def _check_comparable(options: ValidationOptions, *, float_stage: bool, onnx_stage: bool) -> None:
    """Refuse a gate that has nothing to compare with, before anything is sent."""
    if options.max_drop is not None and options.reference is None and not float_stage:
        raise UsageError(
            "--max-drop needs something to drop from.",
            hint="Give --reference MODEL.onnx, or a --ledger with a float stage.",
        )
    if options.min_agreement is not None and options.reference is None and not onnx_stage:
        raise UsageError(
            "--min-agreement needs something to agree with.",
            hint="Give --reference MODEL.onnx, or a --ledger with an onnx stage.",
        )


def _check_interface(target: Target, preprocessing: Preprocessing, batch_size: int) -> None:
    """Refuse a target that does not take one batch of these images, before anything is sent."""
    wanted = target.input.shape
    given = (batch_size, *preprocessing.sample_shape)
    if len(wanted) != len(given) or any(size not in (DYNAMIC, have) for size, have in zip(wanted, given, strict=True)):
        raise ShapeError(f"{target.name} takes {target.input}; the preprocessed images have shape {list(given)}.")
    if wanted[0] not in (DYNAMIC, 1):
        raise ShapeError(
            f"{target.name} takes exactly {wanted[0]} samples per request, and the last request may have fewer.",
            hint="Export the model with a dynamic batch, or with a batch of 1.",
        )
    if target.max_batch_size is not None and batch_size > target.max_batch_size:
        raise ShapeError(f"{target.name} takes at most {target.max_batch_size} samples per request, not {batch_size}.")


def _comparison(
    target: Target,
    options: ValidationOptions,
    ledger: Ledger | None,
    split: Split,
    preprocessing: Preprocessing,
    label_map: Sequence[int] | None,
) -> _Comparison:
    """Find what to hold the answers against: an ONNX file that is run here, or stages of the ledger."""
    recorded = ledger.stages if ledger is not None and ledger.path.exists() else {}
    baseline: dict[str, Any] | None = None
    reference: str | None = None
    expected: StageOutputs | None = None
    if options.reference is not None:
        reference = options.reference.name
        expected = _reference_outputs(options.reference, target.labels, split, preprocessing, label_map)
        baseline = {"name": reference, "top1": expected.top1.value}
    elif ledger is not None and "onnx" in recorded:
        reference = "onnx stage"
        expected = ledger.outputs("onnx")
    if "float" in recorded:
        baseline = {"name": "float stage", "top1": recorded["float"].top1.value}
    return _Comparison(baseline, reference, expected)


def _reference_outputs(
    path: Path,
    labels: tuple[str, ...] | None,
    split: Split,
    preprocessing: Preprocessing,
    label_map: Sequence[int] | None,
) -> StageOutputs:
    """Run an ONNX file over the split; its class scores come in the order of ``labels``."""
    source = load_source(path)
    predict = onnx_classifier(path)
    own = source.labels
    if labels is None or own is None or own == labels:
        in_order = predict
    elif sorted(own) == sorted(labels):
        columns = [own.index(label) for label in labels]

        def in_order(batch: Array) -> Array:
            return predict(batch)[:, columns]

    else:
        raise UsageError(f"The labels of {path.name} are not those of the model: the two cannot be compared.")
    batch_size = source.inputs[0].shape[0] if source.inputs[0].shape else 1
    return evaluate(
        in_order,
        split,
        preprocessing,
        label_map=label_map,
        batch_size=_REFERENCE_BATCH if batch_size == DYNAMIC else batch_size,
    ).outputs


def _report(target: Target, answers: Answers, against: _Comparison, options: ValidationOptions) -> ValidationReport:
    top1 = answers.outputs.top1
    agreement = answers.outputs.agreement(against.expected) if against.expected is not None else None
    drop = against.baseline["top1"] - top1.value if against.baseline is not None else None
    gates = []
    if options.max_drop is not None and drop is not None:
        # percentages are rounded: a drop of exactly the limit passes
        within = drop <= options.max_drop + _ROUNDING
        gates.append(Gate(name="top-1 drop", value=drop, limit=options.max_drop, passed=within))
    if options.min_agreement is not None and agreement is not None:
        gates.append(
            Gate(
                name="agreement",
                value=agreement,
                limit=options.min_agreement,
                passed=agreement >= options.min_agreement - _ROUNDING,
            )
        )
    n = len(answers.outputs.ids)
    return ValidationReport(
        name=target.name,
        version=target.version,
        n=n,
        top1=top1,
        baseline=against.baseline,
        drop=drop,
        reference=against.reference,
        agreement=agreement,
        latency_ms={f"p{q:g}": percentile(answers.latencies_ms.tolist(), q) for q in PERCENTILES},
        throughput_per_s=n / answers.seconds,
        batch_size=options.batch_size,
        concurrency=options.concurrency,
        gates=tuple(gates),
    )
