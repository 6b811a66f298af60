"""Whether a sample's answer depends on what it should not: its place, its neighbours, other callers, the first call."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from trtdeploy.data.dataset import Split
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.tensors import Array
from trtdeploy.validation.spread import change_percent, rows
from trtdeploy.validation.target import Target

FIRST, CALLERS, PLACE = "first answer", "other callers", "place in a batch"
_SAMPLES = 8
_REPEATS = 4


def measure_variation(
    target: Target, split: Split, preprocessing: Preprocessing | None, *, concurrency: int = 4
) -> dict[str, float]:
    """Ask for the same samples in several ways and return the largest change of a score by its cause.

    Each of the first samples is sent alone, and alone once more, which is the reference: where nothing was asked
    before, that compares cold with warm. Then all are sent alone from several threads at once, and in a batch, in the
    same batch the other way round, and each one place further.

    Returns:
        For each of ``FIRST``, ``CALLERS`` and ``PLACE`` the largest change of a score, in percent of the spread of its
        sample's scores; see ``change_percent``. ``PLACE`` is missing where the target takes single samples only.

    Raises:
        ServerError: A request failed, or was not answered with one row of finite scores per sample.
    """
    limit = target.max_batch_size or _SAMPLES
    if target.input.shape[0] == 1:
        limit = 1
    batch = target.prepare(split, preprocessing, range(min(_SAMPLES, len(split))))
    first, reference = (
        np.concatenate([rows(target, batch[index : index + 1]) for index in range(len(batch))]) for _ in range(2)
    )
    found = {FIRST: [first], CALLERS: []}
    with ThreadPoolExecutor(max(2, concurrency)) as threads:
        for _ in range(_REPEATS):
            alone = threads.map(lambda index: rows(target, batch[index : index + 1]), range(len(batch)))
            found[CALLERS].append(np.concatenate(list(alone)))
    for start in range(0, len(batch), limit) if limit > 1 else ():
        part = batch[start : start + limit]
        for order in (np.arange(len(part)), np.arange(len(part))[::-1], np.roll(np.arange(len(part)), 1)):
            together = reference.copy()
            together[start + order] = rows(target, np.ascontiguousarray(part[order]))
            found.setdefault(PLACE, []).append(together)
    return {cause: _largest(others, reference) for cause, others in found.items()}


def _largest(others: list[Array], reference: Array) -> float:
    return max(float(change_percent(other, reference).max()) for other in others)
