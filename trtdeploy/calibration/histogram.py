"""An exact histogram of |x|, collected in one pass over values of any range."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdeploy.calibration.maximum import AbsMaximum

BINS = 16384
_SMALLEST_WIDTH = 2.0**-149
_BLOCK = 1 << 17
_LARGEST_FACTOR_EXPONENT = 126


class AbsHistogram(AbsMaximum):
    """Counts of |x| in equal bins whose width is a power of two.

    Bin ``i`` holds ``i * width <= |x| < (i + 1) * width``. A power of two makes the division of a float32 by the width
    exact, and so every count, without going through float64. When a larger value comes, the width doubles until it
    fits, and neighbouring bins are added up, which is exact too. Counts are int64: float32 counts, as ``torch.histc``
    keeps them, stand still at 2**24 (https://github.com/NVIDIA/TensorRT/issues/2757).

    Attributes:
        counts: int64, shape (BINS,).
        width: Width of a bin.
        relative: float64, shape (BINS,): each value counts as one over the sum of squares of its sample, so that every
            sample weighs the same whatever its size and its scale. A sample is a row of the first axis.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.relative: NDArray[np.float64] = np.zeros(BINS, np.float64)
        self.width = _SMALLEST_WIDTH

    def coarse(self, bins: int) -> tuple[NDArray[np.int64], float]:
        """Return counts and width of the bins up to the largest value, added up in pairs until at most ``bins``."""
        used = int(self.largest / self.width) + 1
        counts, width = self.counts[:used], self.width
        while counts.size > bins:
            counts, width = _in_pairs(counts), 2 * width
        return counts, width

    def _count(self, values: NDArray[np.float32], largest: float) -> None:
        self._widen(largest)
        samples = values if values.ndim > 1 else [values]
        scratch = np.empty(min(samples[0].size, _BLOCK), np.float32), np.empty(min(samples[0].size, _BLOCK), np.intp)
        for sample in samples:
            self._add_sample(sample.ravel(order="K"), *scratch)

    def _add_sample(self, sample: NDArray[np.float32], scaled: NDArray[np.float32], indices: NDArray[np.intp]) -> None:
        exponent = -round(np.log2(self.width))
        steps = [min(exponent, _LARGEST_FACTOR_EXPONENT)]
        if exponent > _LARGEST_FACTOR_EXPONENT:  # no float32 is 1 / width, but two make it
            steps.append(exponent - _LARGEST_FACTOR_EXPONENT)
        factors = [np.float32(2.0**step) for step in steps]
        counted: NDArray[np.int64] = np.zeros(0, np.int64)
        squares = 0.0
        for start in range(0, sample.size, _BLOCK):
            block = sample[start : start + _BLOCK]
            size = block.size
            np.abs(block, out=scaled[:size])
            for factor in factors:
                np.multiply(scaled[:size], factor, out=scaled[:size])
            squares += float(np.dot(scaled[:size], scaled[:size]))
            np.copyto(indices[:size], scaled[:size], casting="unsafe")
            found = np.bincount(indices[:size], minlength=counted.size)
            found[: counted.size] += counted
            counted = found
        self.counts[: counted.size] += counted
        if squares:
            self.relative[: counted.size] += counted / (squares * self.width**2)

    def _widen(self, largest: float) -> None:
        while largest >= BINS * self.width:
            if self.n:
                for bins in (self.counts, self.relative):
                    folded = _in_pairs(bins)
                    bins[: folded.size] = folded
                    bins[folded.size :] = 0
            self.width *= 2


def _in_pairs(bins: NDArray[Any]) -> NDArray[Any]:
    even = bins if bins.size % 2 == 0 else np.append(bins, bins.dtype.type(0))
    pairs: NDArray[Any] = even.reshape(-1, 2).sum(axis=1)
    return pairs
