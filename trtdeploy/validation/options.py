"""What a validation checks, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.statistics import Interval
from trtdeploy.validation.consistency import InstanceConsistency, VersionComparison
from trtdeploy.validation.top_k import TopK


class ValidationOptions(BaseModel):
    """What to check, and how hard to ask.

    Attributes:
        preprocessing: How images become model input; what the target carries if None.
        reference: An ONNX file that is run here on the same inputs, to compare answers with.
        max_drop: Largest allowed drop of top-1 against the baseline, in percentage points.
        prove_drop: Whether ``max_drop`` must be shown on these samples: the whole 95% interval of the paired difference
            has to lie inside, not just its middle.
        min_agreement: Smallest allowed agreement with the reference, in percent.
        max_variation: Largest allowed change of a sample's scores with its place in a batch, in percent of their
            spread; None leaves the check out.
        max_instance_difference: Largest allowed difference of a sample's scores between the answers of instances to one
            request, in percent of their spread; 0 asks for the same bits, None leaves the check out.
        min_version_agreement: Smallest allowed agreement with each other version that is asked, in percent.
        batch_size: Samples per request.
        concurrency: Requests in flight.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    preprocessing: Preprocessing | None = None
    reference: Path | None = None
    max_drop: float | None = None
    prove_drop: bool = False
    min_agreement: float | None = Field(default=None, ge=0, le=100)
    max_variation: float | None = Field(default=None, ge=0)
    max_instance_difference: float | None = Field(default=None, ge=0)
    min_version_agreement: float | None = Field(default=None, ge=0, le=100)
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
        answered_by: How many samples each version has answered, as the server says; empty where there is no server.
        n: Samples sent.
        top1: Correct answers in percent.
        baseline: What the accuracy is compared with, and its top-1 in percent.
        drop: Baseline minus measured, in percentage points.
        reference: What the answers are compared with.
        agreement: Percent of samples with the reference's answer.
        variation: Largest change of one sample's scores between requests that differ in everything else, in percent of
            their spread; None where it was not measured.
        variation_by_cause: The same for the first answer, for other callers at the same time and for the place in a
            batch.
        instances: Whether all instances answer alike; None where it was not measured.
        versions: The answers against those of other versions.
        top_k: The classes that a pipeline has named; None where all are scored.
        latency_ms: Percentiles of the time of one request, with 95% intervals.
        throughput_per_s: Samples per second, preprocessing included.
        batch_size: Samples per request.
        concurrency: Requests in flight.
        gates: The conditions that were asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    version: str
    answered_by: dict[str, int] = Field(default_factory=dict)
    n: int
    top1: Interval
    baseline: dict[str, Any] | None
    drop: float | None
    reference: str | None
    agreement: float | None
    variation: float | None = None
    variation_by_cause: dict[str, float] | None = None
    instances: InstanceConsistency | None = None
    versions: tuple[VersionComparison, ...] = ()
    top_k: TopK | None = None
    latency_ms: dict[str, Interval]
    throughput_per_s: float
    batch_size: int
    concurrency: int
    gates: tuple[Gate, ...]

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(gate.passed for gate in self.gates)
