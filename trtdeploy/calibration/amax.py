"""From a histogram to the range of a tensor, by each of the methods."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal, get_args

import numpy as np

from trtdeploy.calibration.entropy import entropy_bin
from trtdeploy.calibration.histogram import AbsHistogram
from trtdeploy.calibration.maximum import AbsMaximum
from trtdeploy.calibration.squared_error import squared_error_bin
from trtdeploy.errors import QuantizationError

Method = Literal["max", "percentile", "mse", "relative-mse", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)

_ENTROPY_BINS = 4096


def amax_of(values: AbsMaximum, method: Method, *, percentile: float = 99.99) -> float:
    """Return the range of a tensor: values are clipped to [-amax, amax], and ``scale = amax / 127``.

    - ``max``: the largest |x|.
    - ``percentile``: the upper edge of the bin of the value with rank ``ceil(percentile / 100 * n)``, so that at least
      that many values lie inside. Source: pytorch-quantization's calibrator, which takes the lower edge.
    - ``mse``: the least mean squared error of quantization; see ``squared_error``.
    - ``relative-mse``: the least mean over samples of ``||x - fq(x)||**2 / ||x||**2``, one over the signal to
      quantization noise ratio, so that each sample counts the same. The plain mean squared error follows the few
      samples whose values are far beyond those of all others, and leaves the others a handful of codes.
    - ``entropy``: the least Kullback-Leibler divergence; see ``entropy``. It has no meaning for a tensor without values
      near 0, such as the sigmoid of a gate: there the least divergence is where all values are clipped to one. A range
      that would clip more than half of the values is not taken; the largest |x| is.

    No range is larger than the largest |x|.

    Args:
        values: What was kept of all values of the tensor: an ``AbsHistogram``, or an ``AbsMaximum`` for ``max``.
        method: One of ``METHODS``.
        percentile: Of the method of that name, in percent.

    Returns:
        The range; 0 where all values are 0.

    Raises:
        QuantizationError: There were no values, the method is unknown or needs a histogram, or the percentile is not in
            (0, 100].
    """
    if method not in METHODS:
        raise QuantizationError(f"{method!r} is no calibration method; the methods are {', '.join(METHODS)}.")
    if not values.n:
        raise QuantizationError(
            "There are no values to find a range from.",
            hint="Calibrate with at least one image that reaches the tensor.",
        )
    if method == "max" or values.largest == 0:
        return values.largest
    if not isinstance(values, AbsHistogram):
        raise QuantizationError(f"Only the largest value was kept, and {method!r} needs a histogram.")
    if method == "percentile":
        amax = _percentile_edge(values, percentile)
    elif method == "mse":
        counts, width = values.coarse(values.counts.size)
        amax = squared_error_bin(counts) * width
    elif method == "relative-mse":
        used = int(values.largest / values.width) + 1
        amax = squared_error_bin(values.relative[:used]) * values.width
    else:
        counts, width = values.coarse(_ENTROPY_BINS)
        edge = entropy_bin(counts)
        amax = edge * width if 2 * int(counts[:edge].sum()) >= values.n else values.largest
    return min(amax, values.largest)


def _percentile_edge(histogram: AbsHistogram, percentile: float) -> float:
    if not 0 < percentile <= 100:
        raise QuantizationError(f"The percentile {percentile:g} is not in (0, 100].")
    rank = math.ceil(Fraction(str(percentile)) * histogram.n / 100)
    return float(np.searchsorted(np.cumsum(histogram.counts), rank) + 1) * histogram.width
