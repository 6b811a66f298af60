"""``ledger.json``: one record per stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_jsonable_python

from trtdeploy.errors import LedgerError, TrtDeployError, invalid_fields
from trtdeploy.file_format import FileFormat
from trtdeploy.files import atomic_write, locked, sha256_bytes
from trtdeploy.ledger.outputs import Divergence, StageOutputs
from trtdeploy.statistics import Interval, PairedDifference
from trtdeploy.version import __version__

Stage = Literal["float", "ptq", "qat", "onnx", "plan", "served"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class StageRecord(BaseModel):
    """One stage in ``ledger.json``.

    Attributes:
        n: Number of samples.
        top1: Correct answers in percent with the 95% interval.
        top5: Samples whose class is among the five best; None below six classes.
        agreement: Percent of samples with the previous recorded stage's answer; None for the first.
        agreement_with_float: The same against the ``float`` stage, where there is one.
        against_previous: Paired difference of accuracies to the previous recorded stage; None for the first.
        against_float: The same to the ``float`` stage.
        kl_from_float: KL divergence of the softmax from the ``float`` stage's; None if it has other outputs.
        seconds: Wall time of the evaluation.
        latency_ms: Median time of one request of one sample, where it was measured.
        answered_by: Samples that each version of a served model has answered; None where nothing was served.
        source: Where the outputs came from: file, command, server, versions.
        outputs: File with the outputs per sample, beside the ledger.
        outputs_sha256: Its digest.
        recorded_at: UTC time, ISO 8601.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    n: int
    top1: Interval
    agreement: float | None
    agreement_with_float: float | None
    top5: Interval | None = None
    against_previous: PairedDifference | None = None
    against_float: PairedDifference | None = None
    kl_from_float: Divergence | None = None
    seconds: float
    latency_ms: float | None = None
    answered_by: dict[str, int] | None = None
    source: dict[str, Any]
    outputs: str
    outputs_sha256: str
    recorded_at: str


class _LedgerFile(FileFormat):
    model_config = ConfigDict(frozen=False)

    TITLE: ClassVar[str] = "a ledger"
    ERROR: ClassVar[type[TrtDeployError]] = LedgerError

    format: Literal[1] = 1
    minor: int = Field(default=1, ge=0)
    written_by: str = __version__
    dataset: dict[str, Any]
    stages: dict[Stage, StageRecord]


class Ledger:
    """A ledger on disk. Every call reads the file anew, so several processes may record into one ledger.

    Args:
        path: The JSON file; it need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def stages(self) -> Mapping[Stage, StageRecord]:
        """The recorded stages, in the order of ``STAGES``.

        Raises:
            LedgerError: The file is not a ledger.
        """
        stages = self._read().stages
        return {stage: stages[stage] for stage in STAGES if stage in stages}

    def outputs(self, stage: Stage) -> StageOutputs:
        """Return what a recorded stage answered.

        Raises:
            LedgerError: The stage is not recorded, or its outputs were changed afterwards.
        """
        stages = self.stages
        if stage not in stages:
            raise LedgerError(f"{self.path} has no stage {stage!r}; it has {list(stages)}.")
        return self._load_outputs(stages[stage])

    def record(
        self,
        stage: Stage,
        outputs: StageOutputs,
        *,
        seconds: float,
        source: Mapping[str, Any],
        dataset: Mapping[str, Any],
        latency_ms: float | None = None,
        answered_by: Mapping[str, int] | None = None,
    ) -> StageRecord:
        """Add a stage, or replace it, and bring every stage's agreement up to date.

        Args:
            stage: One of ``STAGES``.
            outputs: What the stage answered.
            seconds: Wall time of the evaluation.
            source: Where the outputs came from.
            dataset: Name and fingerprint of the dataset; the same for all stages.
            latency_ms: Median time of one request of one sample.
            answered_by: Samples that each version of a served model has answered.

        Raises:
            LedgerError: The ledger holds other samples, a number is not finite, or ``source`` or ``dataset`` holds
                what JSON cannot.
        """
        if stage not in STAGES:
            raise LedgerError(f"{stage!r} is no stage; the stages are {', '.join(STAGES)}.")
        content = outputs.to_npz()
        dataset = _as_json(dataset)
        with locked(self.path):
            ledger = self._read() if self.path.exists() else _LedgerFile(dataset=dataset, stages={})
            if ledger.stages and dataset != ledger.dataset:
                raise LedgerError(
                    f"{self.path} belongs to dataset {ledger.dataset}, not to {dataset}.",
                    hint="Use the same data and split seed, or another ledger.",
                )
            try:
                record = StageRecord(
                    n=len(outputs.ids),
                    top1=outputs.top1,
                    agreement=None,
                    agreement_with_float=None,
                    top5=outputs.top5,
                    seconds=round(seconds, 3),
                    latency_ms=latency_ms,
                    answered_by=dict(answered_by) if answered_by else None,
                    source=_as_json(source),
                    outputs=f"{self.path.stem}.{stage}.npz",
                    outputs_sha256=sha256_bytes(content),
                    recorded_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                )
            except ValidationError as error:
                raise LedgerError(f"Stage {stage!r} cannot be recorded: {error}") from error
            ledger.dataset = dataset
            ledger.stages[stage] = record
            ledger.stages = self._with_agreements(ledger.stages, {stage: outputs})
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.path.with_name(record.outputs), content)
            atomic_write(self.path, json.dumps(ledger.model_dump(mode="json"), indent=2) + "\n")
            return ledger.stages[stage]

    def summary(self) -> dict[str, Any]:
        """Return what a manifest carries of the ledger: top-1 and number of samples per stage."""
        return {stage: {"n": record.n, "top1": record.top1.value} for stage, record in self.stages.items()}

    def _with_agreements(
        self, stages: Mapping[Stage, StageRecord], fresh: Mapping[Stage, StageOutputs]
    ) -> dict[Stage, StageRecord]:
        updated: dict[Stage, StageRecord] = {}
        baseline: StageOutputs | None = None
        previous: StageOutputs | None = None
        for stage in STAGES:
            if stage not in stages:
                continue
            outputs = fresh[stage] if stage in fresh else self._load_outputs(stages[stage])
            if stage == "float":
                baseline = outputs
            updated[stage] = stages[stage].model_copy(
                update={
                    "agreement": outputs.agreement(previous) if previous is not None else None,
                    "agreement_with_float": outputs.agreement(baseline) if baseline is not None else None,
                    "top5": outputs.top5,
                    "against_previous": outputs.compared_with(previous) if previous is not None else None,
                    "against_float": outputs.compared_with(baseline) if baseline is not None else None,
                    "kl_from_float": _divergence(outputs, baseline),
                }
            )
            previous = outputs
        return updated

    def _load_outputs(self, record: StageRecord) -> StageOutputs:
        path = self.path.with_name(Path(record.outputs).name)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise LedgerError(f"{path}, which {self.path} refers to, cannot be read: {error}.") from error
        if sha256_bytes(content) != record.outputs_sha256:
            raise LedgerError(
                f"{path} is not what {self.path} recorded: its SHA-256 differs.", hint="Record this stage again."
            )
        return StageOutputs.from_npz(content)

    def _read(self) -> _LedgerFile:
        try:
            return _LedgerFile.read(self.path.read_text(encoding="utf-8"), self.path)
        except OSError as error:
            raise LedgerError(f"There is no readable ledger at {self.path}: {error}.") from error
        except (ValidationError, UnicodeDecodeError) as error:
            reason = invalid_fields(error) if isinstance(error, ValidationError) else "it is no text"
            raise LedgerError(f"{self.path} is not a ledger of this version ({reason}).") from error


def _divergence(outputs: StageOutputs, baseline: StageOutputs | None) -> Divergence | None:
    if baseline is None or outputs.logits.shape != baseline.logits.shape:
        return None
    return outputs.divergence_from(baseline)


def _as_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``facts`` as reading them back from JSON would: lists for tuples, text for paths and dates."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(to_jsonable_python(dict(facts)), allow_nan=False))
    except ValueError as error:
        raise LedgerError(f"{dict(facts)} cannot be kept in a ledger: {error}.") from error
    return plain
