"""How far two answers to one sample are apart: in percent of the spread of its scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trtdeploy.errors import ServerError
from trtdeploy.tensors import Array
from trtdeploy.validation.target import Target


def change_percent(scores: Array, reference: Array) -> NDArray[np.float64]:
    """Return each sample's largest change of a score, in percent of the spread of its reference scores.

    The spread is the highest minus the lowest score. A sample whose reference scores are all alike has changed by 100
    if it has changed at all.

    Args:
        scores: Class scores, ``(N, classes)``.
        reference: Those to compare with, of the same shape.
    """
    ours, theirs = scores.astype(np.float64), reference.astype(np.float64)
    spread = theirs.max(axis=1) - theirs.min(axis=1)
    change = np.abs(ours - theirs).max(axis=1)
    percent: NDArray[np.float64] = 100 * change / np.where(spread > 0, spread, np.where(change > 0, change, 1.0))
    return percent


def rows(target: Target, batch: Array) -> Array:
    """Ask a target for a batch and return one row of scores per sample, as they came.

    Raises:
        ServerError: There is not one row per sample, or a score is not finite.
    """
    scores = np.asarray(target.scores(batch))
    if len(scores) != len(batch):
        raise ServerError(f"{target.name} answered {len(scores)} of {len(batch)} samples of a request.")
    if not np.isfinite(scores).all():
        raise ServerError(f"{target.name} answered scores that are not finite.")
    return scores.reshape(len(batch), -1)
