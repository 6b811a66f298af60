"""Two classifiers on the same samples: the difference of their accuracies, and what it shows.

Only the samples that one gets right and the other wrong say anything about the difference. Intervals that ignore the
pairing (two Wilson intervals, for example) are several times too wide for a network and its quantized twin.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from trtdeploy.statistics.intervals import Interval

_BISECTIONS = 80
_MOST_SAMPLES = 10**9


class PairedDifference(BaseModel):
    """A candidate compared with a reference on the same samples.

    Attributes:
        n: Samples.
        gained: Samples that the candidate gets right and the reference wrong.
        lost: The other way round.
        difference: Accuracy of the candidate minus that of the reference, in percentage points, with its interval.
        mcnemar_p: Two-sided p-value of the exact McNemar test that both are equally accurate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    n: int
    gained: int
    lost: int
    difference: Interval
    mcnemar_p: float


class NonInferiority(BaseModel):
    """Whether a candidate's drop is shown to be inside a budget.

    Attributes:
        max_drop: The budget in percentage points.
        confidence: Of the two-sided interval whose lower end is compared with the budget.
        lower: That lower end, in percentage points; negative is a loss.
        shown: ``lower > -max_drop``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_drop: float
    confidence: float
    lower: float
    shown: bool


def compare_paired(
    reference_correct: NDArray[np.bool_], candidate_correct: NDArray[np.bool_], *, confidence: float = 0.95
) -> PairedDifference:
    """Compare two classifiers by which samples each got right, ``(N,)`` both, in the same order."""
    if reference_correct.shape != candidate_correct.shape or reference_correct.ndim != 1:
        raise ValueError(f"need two rows of one length, got {reference_correct.shape} and {candidate_correct.shape}")
    return compare_counts(
        gained=int((candidate_correct & ~reference_correct).sum()),
        lost=int((reference_correct & ~candidate_correct).sum()),
        n=len(reference_correct),
        confidence=confidence,
    )


def compare_counts(*, gained: int, lost: int, n: int, confidence: float = 0.95) -> PairedDifference:
    """Compare two classifiers by the counts of the samples that only one of them got right."""
    return PairedDifference(
        n=n,
        gained=gained,
        lost=lost,
        difference=tango_percent(gained, lost, n, confidence=confidence),
        mcnemar_p=mcnemar_exact_p(gained, lost),
    )


def tango_percent(gained: float, lost: float, n: float, *, confidence: float = 0.95) -> Interval:
    """Return ``100 (gained - lost) / n`` with Tango's score interval for a difference of paired proportions.

    It holds for few discordant pairs and for none, where the usual Wald interval has no width.
    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 17, 1998, 891-908; recommended by Fagerland, Lydersen and Laake, "Recommended tests
    and confidence intervals for paired binomial proportions", Statistics in Medicine 33, 2014.
    """
    if not (gained >= 0 and lost >= 0 and n > 0 and gained + lost <= n):
        raise ValueError(f"need gained, lost >= 0 and gained + lost <= n, got {gained}, {lost} of {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence lies between 0 and 1, got {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    value = (gained - lost) / n
    # By symmetry, the lower end is minus the upper end of the reversed comparison.
    low, high = -_upper_end(lost, gained, n, z), _upper_end(gained, lost, n, z)
    return Interval(value=100 * value, low=100 * min(low, value), high=100 * max(high, value))


def mcnemar_exact_p(gained: int, lost: int) -> float:
    """Return the two-sided p-value of the exact conditional McNemar test: a sign test on the discordant pairs.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 12,
    1947; exact form: Agresti, "Categorical Data Analysis", section 11.1.
    """
    if gained < 0 or lost < 0:
        raise ValueError(f"counts are not negative, got {gained} and {lost}")
    discordant = gained + lost
    term = tail = 1  # binomial coefficients, exact
    for k in range(min(gained, lost)):
        term = term * (discordant - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << discordant))


def non_inferiority(gained: int, lost: int, n: int, *, max_drop: float, confidence: float = 0.95) -> NonInferiority:
    """Say whether a drop is shown to be smaller than ``max_drop`` percentage points.

    The rule is that of the interval: its lower end lies above minus the budget. With the two-sided 95% interval, a
    candidate whose true drop is the budget passes in 2.5% of all cases.
    Source: Piaggio et al., "Reporting of noninferiority and equivalence randomized trials: extension of the CONSORT
    2010 statement", JAMA 308, 2012.
    """
    if not 0 < max_drop < 100:
        raise ValueError(f"a budget lies between 0 and 100 percentage points, got {max_drop}")
    lower = tango_percent(gained, lost, n, confidence=confidence).low
    return NonInferiority(max_drop=max_drop, confidence=confidence, lower=lower, shown=lower > -max_drop)


def samples_needed(gained: int, lost: int, n: int, *, max_drop: float, confidence: float = 0.95) -> int | None:
    """Return how many samples would show a drop below ``max_drop``, if the shares gained and lost stay as they are.

    An orientation, not a power analysis: with exactly so many, chance decides like a coin.

    Returns:
        None if the drop as measured is not inside the budget, so that no number of samples would help.
    """

    def shows(samples: int) -> bool:
        scale = samples / n
        low = tango_percent(gained * scale, lost * scale, samples, confidence=confidence).low
        return low > -max_drop

    if 100 * (gained - lost) / n <= -max_drop or not shows(_MOST_SAMPLES):
        return None
    few, many = 0, _MOST_SAMPLES
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if shows(middle) else (middle, many)
    return many


def _upper_end(gained: float, lost: float, n: float, z: float) -> float:
    """Return the largest difference that the score test does not reject, found by bisection: the score falls."""
    low, high = (gained - lost) / n, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _score(gained, lost, n, middle) < -z:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def _score(gained: float, lost: float, n: float, difference: float) -> float:
    """Return Tango's score statistic of the hypothesis that the true difference is ``difference``.

    Equation 14 of the paper with ``b = gained`` and ``c = lost``; ``q`` is the maximum-likelihood share of lost samples
    under that hypothesis.
    """
    a = 2 * n
    b = -gained - lost + (2 * n - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    q = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = n * (2 * q + difference * (1 - difference))
    deviation = gained - lost - n * difference
    if variance <= 0:
        return 0.0 if deviation == 0 else math.copysign(math.inf, deviation)
    return deviation / math.sqrt(variance)
