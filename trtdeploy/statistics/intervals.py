"""Intervals around measured proportions and percentiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from pydantic import BaseModel, ConfigDict


class Interval(BaseModel):
    """A measured value with its confidence interval, all in the unit that the field says."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    value: float
    low: float
    high: float

    def format(self, decimals: int = 2) -> str:
        """Return ``83.60 [82.86, 84.31]``."""
        return f"{self.value:.{decimals}f} [{self.low:.{decimals}f}, {self.high:.{decimals}f}]"


def wilson_percent(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Return a proportion in percent with its Wilson score interval.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"need 0 <= successes <= n and n > 0, got {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    proportion = successes / n
    denominator = 1 + z * z / n
    centre = (proportion + z * z / (2 * n)) / denominator
    half = z * math.sqrt(proportion * (1 - proportion) / n + z * z / (4 * n * n)) / denominator
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(value=100 * proportion, low=100 * low, high=100 * high)


def percentile(samples: Sequence[float], q: float, *, confidence: float = 0.95) -> Interval:
    """Return the ``q``-th percentile (0 to 100) with a distribution-free interval from order statistics.

    The number of samples below the true quantile is binomial; its normal approximation picks the two order statistics
    that enclose the quantile. Where there are too few samples for that, the interval ends at the smallest or largest
    sample and covers the quantile less often than ``confidence`` says.
    Source: Le Boudec, "Performance Evaluation of Computer and Communication Systems", 2010, theorem 2.1.
    """
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    n = len(ordered)
    if n == 0 or not np.isfinite(ordered).all():
        raise ValueError("a percentile needs at least one sample, all of them finite")
    if not 0 <= q <= 100:
        raise ValueError(f"a percentile lies between 0 and 100, got {q}")
    p = q / 100
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    spread = z * math.sqrt(n * p * (1 - p))
    low_rank = max(1, math.floor(n * p - spread))
    high_rank = min(n, math.ceil(n * p + spread) + 1)
    return Interval(
        value=float(np.percentile(ordered, q)), low=float(ordered[low_rank - 1]), high=float(ordered[high_rank - 1])
    )
