"""Whether a sample's answer depends on what it should not: its place, its neighbours, the instance, the first call."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from trtdeploy.datasets.dataset import Split
from trtdeploy.errors import ServerError
from trtdeploy.preprocessing import Preprocessing
from trtdeploy.tensors import Array
from trtdeploy.validation.target import Target

_SAMPLES = 8
_REPEATS = 4


def measure_variation(target: Target, split: Split, preprocessing: Preprocessing, *, concurrency: int = 4) -> float:
    """Ask for the same samples in several ways and return the largest change of a score.

    Each of the first samples is sent alone, at once from several threads (so that every instance answers), in a batch,
    in the same batch the other way round, and alone once more. The first answer is the reference: where nothing was
    asked before, that compares cold with warm.

    Returns:
        The largest difference of a score from the first answer, in percent of the spread (highest minus lowest score)
        of that sample's first answer. A sample whose scores are all alike counts as 100 if it changes at all.

    Raises:
        ServerError: A request failed, or was not answered with one row per sample.
    """
    limit = target.max_batch_size or _SAMPLES
    if target.input.shape[0] == 1:
        limit = 1
    batch = preprocessing.normalise(split.pixels(preprocessing, range(min(_SAMPLES, len(split)))))
    first = np.concatenate([_rows(target, batch[index : index + 1]) for index in range(len(batch))])
    others = []
    with ThreadPoolExecutor(max(2, concurrency)) as threads:
        for _ in range(_REPEATS):
            alone = threads.map(lambda index: _rows(target, batch[index : index + 1]), range(len(batch)))
            others.append(np.concatenate(list(alone)))
    for start in range(0, len(batch), limit) if limit > 1 else ():
        part = batch[start : start + limit]
        for order in (np.arange(len(part)), np.arange(len(part))[::-1], np.roll(np.arange(len(part)), 1)):
            together = first.copy()
            together[start + order] = _rows(target, np.ascontiguousarray(part[order]))
            others.append(together)
    spread = first.max(axis=1) - first.min(axis=1)
    change = np.max([np.abs(other - first).max(axis=1) for other in others], axis=0)
    percent = np.where(change == 0, 0.0, 100 * change / np.where(spread > 0, spread, np.maximum(change, 1e-30)))
    return float(percent.max())


def _rows(target: Target, batch: Array) -> Array:
    scores = target.scores(batch)
    if len(scores) != len(batch):
        raise ServerError(f"{target.name} answered {len(scores)} of {len(batch)} samples of a request.")
    rows: Array = np.asarray(scores, dtype=np.float64).reshape(len(batch), -1)
    if not np.isfinite(rows).all():
        raise ServerError(f"{target.name} answered scores that are not finite.")
    return rows
