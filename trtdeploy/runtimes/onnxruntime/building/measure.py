"""Choosing the fastest of several optimized models by measuring them side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from trtdeploy.runtimes.onnxruntime.session import Session
from trtdeploy.tensors import Array

_ROUNDS_FOR_ALL = 4
_FAR_BEHIND = 1.5


def relative_error(outputs: Sequence[Array], reference: Sequence[Array]) -> float:
    """Return the largest ``||output - reference|| / ||reference||`` (Euclidean) over all outputs.

    Infinities and NaN must be where the reference has them; else the error is infinite.
    """
    worst = 0.0
    for output, expected in zip(outputs, reference, strict=True):
        if output.shape != expected.shape:
            return float("inf")
        finite = np.isfinite(expected)
        if not np.array_equal(output[~finite], expected[~finite], equal_nan=True):
            return float("inf")
        if not np.isfinite(output[finite]).all():
            return float("inf")
        wanted = expected[finite].astype(np.float64)
        difference = float(np.linalg.norm(output[finite].astype(np.float64) - wanted))
        size = float(np.linalg.norm(wanted))
        error = difference / size if size else difference
        if np.isnan(error):  # both norms overflow
            return float("inf")
        worst = max(worst, error)
    return worst


def median_milliseconds(
    sessions: Mapping[str, Session],
    inputs: Mapping[str, Array],
    *,
    rounds: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Time sessions in turn, A B C A B C ..., so that a change of the machine's speed hits all of them alike.

    After a few rounds, sessions that are far behind the fastest are not timed further.
    """
    times: dict[str, list[float]] = {name: [] for name in sessions}
    running = dict(sessions)
    for turn in range(rounds):
        for name, session in running.items():
            if turn == 0:
                session.run(None, inputs)  # the first run allocates
            start = time.perf_counter()
            session.run(None, inputs)
            times[name].append(1e3 * (time.perf_counter() - start))
        if turn + 1 == _ROUNDS_FOR_ALL:
            medians = {name: statistics.median(values) for name, values in times.items()}
            limit = _FAR_BEHIND * min(medians.values())
            running = {name: session for name, session in sessions.items() if medians[name] <= limit}
        if progress:
            progress(turn + 1, rounds)
    return {name: statistics.median(values) for name, values in times.items()}
