"""The range of least mean squared error, all candidates at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trtdeploy.tensors import Array

CODES = 127
_START_BIN = 128
_STEPS_PER_OCTAVE = 256


def candidates_of(bins: int) -> NDArray[np.int64]:
    """Return the bin edges that are tried as ranges: every one up to 512, then steps of at most 1/256 of the range."""
    edges = [min(_START_BIN, bins)]
    while edges[-1] < bins:
        edges.append(min(bins, edges[-1] + max(1, edges[-1] // _STEPS_PER_OCTAVE)))
    return np.array(edges, np.int64)


def squared_errors(counts: Array, candidates: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean of (x - fq(x))**2 for each candidate range, in units of the squared bin width.

    x is the centre of a bin. ``fq(x) = scale * min(rint(x / scale), 127)`` with ``scale = edge / 127``: that is what
    codes of [-128, 127] do to |x|; that the code -128 serves a few negative values better, a histogram of |x| cannot
    see. Prefix sums of count, x and x**2 give the error of all that takes one code as a difference of two entries.

    Args:
        counts: Of equal bins from 0 on, shape (bins,).
        candidates: Edges: ``i`` is the range ``i * width``.
    """
    weights = np.asarray(counts, np.float64)
    weights = weights / max(weights.sum(), 1.0)
    centres = np.arange(weights.size) + 0.5
    sums = [np.concatenate([[0.0], np.cumsum(weights * centres**power)]) for power in (0, 1, 2)]
    scales = candidates / CODES
    # values on the boundary of two codes are equally far from both
    boundaries = np.ceil((np.arange(CODES) + 0.5) * scales[:, None] - 0.5).astype(np.int64)
    bounds = np.empty((candidates.size, CODES + 2), np.int64)
    bounds[:, 0], bounds[:, -1] = 0, weights.size
    np.clip(boundaries, 0, weights.size, out=bounds[:, 1:-1])
    n, first, second = (np.diff(each[bounds], axis=1) for each in sums)
    values = np.arange(CODES + 1) * scales[:, None]
    errors: NDArray[np.float64] = (second - 2 * values * first + values**2 * n).sum(axis=1)
    return errors


def squared_error_bin(counts: Array) -> int:
    """Return the candidate edge of least error; the smallest of equal ones."""
    candidates = candidates_of(len(counts))
    return int(candidates[np.argmin(squared_errors(counts, candidates))])
