"""The best classes of each sample, where a target names only those."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from trtdeploy.ledger import StageOutputs
from trtdeploy.statistics import Interval, wilson_percent


class TopK(BaseModel):
    """The classes that were named, against the true ones and against those of the reference.

    Attributes:
        k: How many are named per sample.
        accuracy: Samples whose class is among them, in percent.
        same_classes: Percent of samples with the same ``k`` classes as the reference, in any order; None without one.
        largest_difference: Largest difference of a named class's probability from the reference's softmax, in
            percentage points; None without a reference.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    k: int
    accuracy: Interval
    same_classes: float | None
    largest_difference: float | None


def compare_top_k(outputs: StageOutputs, expected: StageOutputs | None, k: int) -> TopK:
    """Compare the ``k`` best classes of each sample with its true class, and with the reference's best.

    Raises:
        LedgerError: The reference saw other samples.
    """
    best = _best(outputs, k)
    found = int((best == outputs.labels[:, None]).any(axis=1).sum())
    same, largest = None, None
    if expected is not None:
        outputs.agreement(expected)  # refuses other samples
        same = 100 * float((np.sort(best, axis=1) == np.sort(_best(expected, k), axis=1)).all(axis=1).mean())
        ours, theirs = (np.take_along_axis(_softmax(stage.logits), best, axis=1) for stage in (outputs, expected))
        largest = 100 * float(np.abs(ours - theirs).max())
    return TopK(
        k=k,
        accuracy=wilson_percent(found, len(outputs.ids)),
        same_classes=same,
        largest_difference=largest,
    )


def _best(outputs: StageOutputs, k: int) -> NDArray[np.int64]:
    return np.argsort(-outputs.logits, axis=1, kind="stable")[:, :k]


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return shares
