"""What a validation report says: facts only, everything that the page shows and the JSON holds."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, Literal

import numpy as np

from trtdeploy.data.dataset import Dataset
from trtdeploy.frozen_model import FrozenModel
from trtdeploy.ledger import Ledger
from trtdeploy.plan import Manifest, PrecisionFacts
from trtdeploy.report.disagreements import Disagreement, worst_disagreements
from trtdeploy.statistics import Interval, PairedDifference
from trtdeploy.validation import Examination, Target, ValidationReport
from trtdeploy.version import __version__

_BINS = 40


class StageRow(FrozenModel):
    """One stage of the ledger; ``change`` is its paired difference of accuracies to the stage before."""

    stage: str
    n: int
    top1: Interval
    agreement: float | None
    change: PairedDifference | None = None
    latency_ms: float | None
    recorded_at: str

    @property
    def loss_shown(self) -> bool:
        """Whether the interval of the change lies below 0."""
        return self.change is not None and self.change.difference.high < 0


class Histogram(FrozenModel):
    """How many requests took how long: ``counts[i]`` between ``edges_ms[i]`` and ``edges_ms[i + 1]``."""

    edges_ms: tuple[float, ...]
    counts: tuple[int, ...]


class TimeShare(FrozenModel):
    """One part of the mean time of a request."""

    name: Literal["client and network", "queue", "input", "infer", "output"]
    milliseconds: float


class Report(FrozenModel):
    """Everything that a report says.

    Attributes:
        title: What was validated.
        created_at: UTC time, ISO 8601.
        passed: Whether every gate holds; None where no gate was asked for, so that nothing was decided.
        validation: The outcome.
        stages: The ledger from float to served; empty without one.
        classes: Names, in the order of ``confusion``.
        confusion: Samples by true class (rows) and answer (columns).
        disagreements: The answers that are most certain and not the expected ones.
        disagreements_in_all: How many there are.
        latency: Distribution of the time of one request at the client.
        times: Where the mean time of a request went; empty where there is no server, or it does not say.
        precision: What the plan's layers were asked for and run in; None where the plan's manifest is not at hand.
        provenance: Hashes, versions and names.
    """

    format: Literal[1] = 1
    title: str
    created_at: str
    passed: bool | None
    validation: ValidationReport
    stages: tuple[StageRow, ...]
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    disagreements: tuple[Disagreement, ...]
    disagreements_in_all: int
    latency: Histogram
    times: tuple[TimeShare, ...]
    precision: PrecisionFacts | None
    provenance: dict[str, str]


def compose(
    target: Target,
    dataset: Dataset,
    examination: Examination,
    *,
    ledger: Ledger | None = None,
    manifest: Manifest | None = None,
) -> Report:
    """Gather the facts of a report.

    Args:
        target: Who was asked.
        dataset: What was sent.
        examination: What came of it.
        ledger: Its stages become the chart.
        manifest: Of the plan that answered, for its precision and hashes.

    Raises:
        DataError: The image of a disagreement cannot be read any more.
    """
    validation = examination.report
    outputs = examination.answers.outputs
    classes = class_names(examination)
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion, (outputs.labels, outputs.predictions), 1)
    shown, in_all = worst_disagreements(examination, classes)
    stages = ledger.stages if ledger is not None and ledger.path.exists() else {}
    return Report(
        title=f"{validation.name}{' version ' + validation.version if validation.version else ''}",
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        passed=validation.passed if validation.gates else None,
        validation=validation,
        stages=tuple(
            StageRow(
                stage=stage,
                n=record.n,
                top1=record.top1,
                agreement=record.agreement,
                change=record.against_previous,
                latency_ms=record.latency_ms,
                recorded_at=record.recorded_at,
            )
            for stage, record in stages.items()
        ),
        classes=classes,
        confusion=tuple(tuple(map(int, row)) for row in confusion),
        disagreements=shown,
        disagreements_in_all=in_all,
        latency=_histogram(examination),
        times=_times(examination),
        precision=manifest.precision if manifest is not None else None,
        provenance=_provenance(target.source, dataset, target, manifest),
    )


def class_names(examination: Examination) -> tuple[str, ...]:
    """Return a name for every class that is true or was answered; a number where the model has no label for it."""
    outputs, expected = examination.answers.outputs, examination.expected
    indices = [outputs.labels, outputs.predictions, *([expected.predictions] if expected is not None else [])]
    count = 1 + max(int(each.max()) for each in indices)
    return (*examination.classes, *map(str, range(len(examination.classes), count)))


def _histogram(examination: Examination) -> Histogram:
    """Bin up to the 99th percentile, every bin wider than the one before by the same ratio; the last takes the tail.

    A latency's tail is many times its median: with even bins, one bar would hold nearly all requests.
    """
    latencies = examination.answers.latencies_ms
    low, high = max(float(latencies.min()), 1e-6), float(np.percentile(latencies, 99))
    edges = np.geomspace(low, max(high, low * 1.001 + 1e-6), _BINS + 1)
    counts, _ = np.histogram(np.clip(latencies, edges[0], edges[-1]), edges)
    edges[-1] = max(edges[-1], float(latencies.max()))
    return Histogram(edges_ms=tuple(map(float, edges)), counts=tuple(map(int, counts)))


def _times(examination: Examination) -> tuple[TimeShare, ...]:
    server = examination.server_times
    if server is None:
        return ()
    mean_ms = float(examination.answers.latencies_ms.mean())
    inside = server.queue_ms + server.input_ms + server.infer_ms + server.output_ms
    return (
        TimeShare(name="client and network", milliseconds=max(0.0, mean_ms - inside)),
        TimeShare(name="queue", milliseconds=server.queue_ms),
        TimeShare(name="input", milliseconds=server.input_ms),
        TimeShare(name="infer", milliseconds=server.infer_ms),
        TimeShare(name="output", milliseconds=server.output_ms),
    )


def _provenance(
    source: Mapping[str, Any], dataset: Dataset, target: Target, manifest: Manifest | None
) -> dict[str, str]:
    facts = {f"target {key}": str(value) for key, value in source.items()}
    facts["dataset"] = dataset.name.rpartition("/")[2] or dataset.name
    facts["dataset fingerprint"] = dataset.fingerprint
    if target.preprocessing is not None:
        facts["preprocessing digest"] = target.preprocessing.digest
    if manifest is not None:
        facts |= {
            "plan sha256": manifest.plan_sha256,
            "plan runtime": f"{manifest.runtime.name} {manifest.runtime.version}",
            "plan built": manifest.created_at,
            "onnx file": manifest.onnx.file,
            "onnx sha256": manifest.onnx.sha256,
        }
    facts["trtdeploy"] = __version__
    facts["python"] = platform.python_version()
    facts["client machine"] = f"{platform.system()} {platform.machine()}"
    return facts
