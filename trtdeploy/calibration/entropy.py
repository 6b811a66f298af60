"""The range of least Kullback-Leibler divergence, all candidates at once.

Source: the algorithm of NVIDIA's GTC talk s7310 (8-bit inference with TensorRT) as pytorch-quantization's
``_compute_amax_entropy`` has it. For every candidate ``i`` the reference P is the first ``i`` bins with all that lies
beyond added to the last of them. Q is the same bins without what lies beyond, merged into 128 levels, each spread
evenly over its bins that are not empty. The last ``i`` with the least KL(P || Q) wins. Bin 0 counts as much as bin 1,
so that the zeros of a ReLU do not decide.

With prefix sums of counts, of non-empty bins and of ``b log b``, every level's share of a divergence is a difference of
two entries, so that nothing loops over bins. Where candidates are equal up to rounding, they are computed once more in
the order in which the library adds, since the order decides which one wins.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from trtdeploy.tensors import Array

LEVELS = 128
_TIE = 1e-11
"""Divergences closer than this are computed again; the sums below are good to about 1e-13."""


def entropy_bin(counts: Array, *, start_bin: int = LEVELS, stride: int = 1) -> int:
    """Return the index of the bin edge that is the range.

    The same as pytorch-quantization's for equal counts, also where it is odd: while the first ``i`` bins are all empty
    the divergence is undefined, and the library takes the last such ``i``. Callers who want none of that start behind
    the first bin that is not empty. Not the same: ``counts`` is left as it is, and large counts raise no "Count
    mismatch!".

    Args:
        counts: Of equal bins from 0 on, shape (bins,).
        start_bin: The first candidate.
        stride: Distance between candidates.
    """
    bins = np.array(counts, np.float64)
    if bins.size < max(start_bin, 2):
        return int(bins.size)
    bins[0] = bins[1]
    candidates = np.arange(start_bin, bins.size + 1, stride)
    divergences = _divergences(bins, candidates)
    undefined = np.flatnonzero(np.isnan(divergences))
    if undefined.size:
        return int(candidates[undefined[-1]])
    least = divergences.min()
    if np.isinf(least):
        return int(candidates[-1])
    tied = np.flatnonzero(divergences <= least + _TIE)
    if tied.size == 1:
        return int(candidates[tied[0]])
    winner, lowest = int(candidates[tied[-1]]), np.inf
    exact = np.where(_is_zero(bins, candidates[tied]), 0.0, np.nan)
    for index in reversed(range(tied.size)):
        candidate = int(candidates[tied[index]])
        divergence = exact[index] if exact[index] == 0 else _as_the_library_adds(bins, candidate)
        if divergence < lowest:
            winner, lowest = candidate, divergence
    return winner


def _starts(candidates: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where each level begins, and the last ends, shape (candidates, LEVELS + 1): bin >= level * i / LEVELS."""
    starts: NDArray[np.int64] = -(-(candidates[:, None] * np.arange(LEVELS + 1)) // LEVELS)
    return starts


def _sums(values: Array) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _divergences(bins: NDArray[np.float64], candidates: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return KL(P || Q) of each candidate: NaN where Q has no mass, infinite where P has some that Q lacks."""
    total = bins.sum()
    if total == 0:
        return np.full(candidates.size, np.nan)
    bins = bins / total
    starts = _starts(candidates)
    inside, filled, entropies = _sums(bins), _sums(bins > 0), _sums(_x_log_x(bins))
    levels = np.diff(inside[starts], axis=1)
    non_empty = np.diff(filled[starts], axis=1)
    mass = inside[candidates]
    # exact zero where nothing lies beyond, which a difference of rounded sums would not be
    beyond = _sums(bins[::-1])[::-1][candidates]
    last = bins[candidates - 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_q = np.where(non_empty > 0, np.log(levels / np.maximum(non_empty, 1)), 0.0)
        log_q[levels <= 0] = 0.0
        cross = (levels * log_q).sum(axis=1) + beyond * log_q[:, -1] - np.log(mass)
        divergences: NDArray[np.float64] = entropies[candidates - 1] + _x_log_x(last + beyond) - cross
    divergences[(beyond > 0) & (last == 0)] = np.inf
    divergences[filled[candidates] == 0] = np.nan
    return divergences


def _x_log_x(values: NDArray[np.float64]) -> NDArray[np.float64]:
    product: NDArray[np.float64] = values * np.log(np.where(values > 0, values, 1.0))
    return product


def _is_zero(bins: NDArray[np.float64], candidates: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say of which candidates P = Q bin for bin: nothing lies beyond, and no level has two different counts."""
    filled = np.flatnonzero(bins)
    changed = np.zeros(bins.size, np.float64)
    changed[filled[1:]] = bins[filled[1:]] != bins[filled[:-1]]
    changes = _sums(changed)
    following = np.full(bins.size + 1, bins.size)
    following[filled] = filled
    following = np.minimum.accumulate(following[::-1])[::-1]
    starts = _starts(candidates)
    first = np.minimum(following[starts[:, :-1]] + 1, starts[:, 1:])  # a change at a level's first bin is none inside
    inside = changes[starts[:, 1:]] - changes[first]
    nothing_beyond = candidates > (filled[-1] if filled.size else -1)
    zero: NDArray[np.bool_] = nothing_beyond & (inside == 0).all(axis=1)
    return zero


def _as_the_library_adds(bins: NDArray[np.float64], candidate: int) -> float:
    """Return one divergence, operation for operation as numpy and scipy.stats.entropy compute it."""
    starts = _starts(np.array([candidate]))[0]
    head = bins[:candidate]
    filled = head != 0
    sums, non_empty = np.diff(_sums(head)[starts]), np.diff(_sums(filled)[starts])
    q = np.where(filled, np.repeat(sums / np.maximum(non_empty, 1), np.diff(starts)), 0.0)
    p = head.copy()
    p[-1] += bins[candidate:].sum()
    p, q = p / p.sum(), q / q.sum()
    if ((p > 0) & (q == 0)).any():
        return np.inf
    terms = np.zeros(candidate)
    p_filled, q_filled = p[p > 0], q[p > 0]
    # scipy.special.rel_entr takes the logarithms of the C library, whose last bit is not always numpy's
    terms[p > 0] = [
        one * (math.log1p((one - other) / other) if 0.5 < one / other < 2 else math.log(one / other))
        for one, other in zip(p_filled.tolist(), q_filled.tolist(), strict=True)
    ]
    return float(terms.sum())
