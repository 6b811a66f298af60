"""Choosing a calibration method for a model without labels: which one leaves held-out answers closest to float."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from trtdeploy.calibration import Method
from trtdeploy.errors import UsageError
from trtdeploy.quantizing.closeness import require_numbers
from trtdeploy.quantizing.output_scores import Answers, per_sample_sqnr_db
from trtdeploy.tensors import Array


@dataclass(frozen=True)
class Candidate:
    """A method with its percentile, where it has one."""

    method: Method
    percentile: float | None = None

    @property
    def name(self) -> str:
        """How people write it."""
        return self.method if self.percentile is None else f"{self.method} {self.percentile:g}"


CANDIDATES = (
    Candidate("max"),
    Candidate("percentile", 99.9),
    Candidate("percentile", 99.99),
    Candidate("percentile", 99.999),
    Candidate("mse"),
    Candidate("relative-mse"),
    Candidate("entropy"),
)
"""No method is best everywhere: entropy collapses on some networks where max is fine, and the squared error follows
a few images with values a hundred times larger than all others."""

_GIVE_A_METHOD = "Give a --method (max, percentile, mse, relative-mse or entropy)"


@dataclass(frozen=True)
class Score:
    """How close a candidate's answers to held-out samples are to the float model's.

    Attributes:
        median_db: The median over the samples of the answers' SQNR; infinite where most samples have equal answers.
        mean_noise: The mean over the samples of noise / signal, which parts candidates of equal median.
    """

    median_db: float
    mean_noise: float

    @property
    def order(self) -> tuple[float, float]:
        """The larger the better."""
        return self.median_db, -self.mean_noise

    @property
    def recorded(self) -> float | None:
        """The median as JSON can say it: None where it is infinite."""
        return round(self.median_db, 3) if math.isfinite(self.median_db) else None


def score_candidates(
    float_model: onnx.ModelProto,
    quantized: Callable[[Candidate], onnx.ModelProto],
    held_out: Sequence[Mapping[str, Array]],
    progress: Callable[[int, int], None],
    answers: Answers,
) -> dict[Candidate, Score]:
    """Return for each candidate how close its answers to held-out samples are to the float model's.

    The median, because what matters is how many samples keep their answer, and one broken sample outweighs all others
    in a mean.

    Args:
        float_model: What the answers are compared with.
        quantized: Makes the model of a candidate.
        held_out: Batches of inputs that no range was found on.
        progress: Called with the candidates done and in all.
        answers: The tensors to compare.

    Raises:
        UsageError: There is nothing to compare.
        QuantizationError: The float model answers NaN.
    """
    if not answers.types:
        raise UsageError(
            "No output of the model is float, nor is what leads to one, so --method auto has nothing to judge by.",
            hint=_GIVE_A_METHOD,
        )
    run = answers.witness(float_model)
    expected = [run(batch) for batch in held_out]
    for found_answers in expected:
        require_numbers(answers, found_answers)
    scores: dict[Candidate, Score] = {}
    for index, candidate in enumerate(CANDIDATES, 1):
        run = answers.witness(quantized(candidate))
        found: list[float] = []
        for batch, reference in zip(held_out, expected, strict=True):
            found += per_sample_sqnr_db(reference, run(batch))
        with np.errstate(over="ignore", invalid="ignore"):
            noise = float(np.mean(np.power(10.0, np.negative(found) / 10)))
            median = float(np.median(found))
        scores[candidate] = Score(median if not math.isnan(median) else -math.inf, noise)
        progress(index, len(CANDIDATES))
    return scores


def best_of(scores: Mapping[Candidate, Score]) -> Candidate:
    """Return the candidate whose answers are closest.

    Raises:
        UsageError: Nothing tells them apart: no candidate has a finite score.
    """
    best = max(scores, key=lambda candidate: scores[candidate].order)
    alike = {score.mean_noise for score in scores.values() if score.median_db == scores[best].median_db}
    if scores[best].recorded is None and len(alike) == 1:
        what = (
            "equal to the float model's"
            if scores[best].median_db > 0
            else "not comparable: all zeros, not finite, or of other shapes"
        )
        raise UsageError(
            f"Nothing tells the methods apart: with every one of them the answers to held-out samples are {what}.",
            hint=f"{_GIVE_A_METHOD}, or samples with other answers.",
        )
    return best
