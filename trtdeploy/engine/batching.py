"""How many samples of several requests are best run together, found by running them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial

import numpy as np

from trtdeploy.engine.engine import Engine
from trtdeploy.errors import TrtDeployError
from trtdeploy.tensors import Array, random_inputs

logger = logging.getLogger(__name__)

# A batch makes its first requests wait for the last one, and requests have to be copied into it: it must be worth that.
_WORTH = 0.05


def fastest_batch(engine: Engine, largest: int, *, budget_s: float = 0.25) -> int:
    """Return the number of samples that take the least time per sample when requests of one sample are joined.

    A GPU is nearly always fastest with the largest batch. A processor is not: one thread has no idle units to fill, and
    the activations of a large batch leave its caches. It is faster where weights are read once for many samples, and
    where a run itself costs as much as its samples. Which of these holds is measured, on random inputs, for 1, 2, 4 ...
    samples, in turn, so that a change of the machine's speed hits all sizes alike.

    Args:
        engine: Its inputs' first dimension is the batch.
        largest: Samples that one run may take.
        budget_s: Seconds for further rounds, after one in which sizes are found.
    """
    if largest < 2:
        return largest
    try:
        return smallest_worthwhile(_seconds(engine, largest, budget_s))
    except TrtDeployError as error:  # random values are no input for every network
        logger.warning("samples are joined up to %d at a time: random inputs cannot be run (%s)", largest, error)
        return largest


def smallest_worthwhile(seconds: Mapping[int, float]) -> int:
    """Return the smallest size whose time per sample is the least, but for what a batch must save to be worth it.

    Args:
        seconds: Of a run, by the number of its samples.
    """
    each = {size: total / size for size, total in seconds.items()}
    limit = min(each.values()) / (1 - _WORTH)
    return min(size for size, value in each.items() if value <= limit)


def _seconds(engine: Engine, largest: int, budget_s: float) -> dict[int, float]:
    """Return the shortest time of a run by its number of samples, what joins the samples included.

    Sizes end where two of them, one after the other, have saved nothing.
    """
    sizes = [*(1 << power for power in range((largest - 1).bit_length())), largest]
    batches: dict[int, list[dict[str, Array]]] = {}
    best: dict[int, float] = {}
    for size in filter(partial(_takes, engine), sizes):
        batches[size] = _samples(engine, size)
        _run(engine, batches[size])  # the first run of a size allocates
        best[size] = _run(engine, batches[size])
        if len(best) > 2 and smallest_worthwhile(best) not in list(best)[-2:]:
            break
    end = time.perf_counter() + budget_s
    while time.perf_counter() < end:
        for size, samples in batches.items():
            best[size] = min(best[size], _run(engine, samples))
    return best


def _run(engine: Engine, samples: list[dict[str, Array]]) -> float:
    start = time.perf_counter()
    if len(samples) == 1:
        engine.infer(samples[0])
    else:
        engine.infer({name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]})
    return time.perf_counter() - start


def _samples(engine: Engine, count: int) -> list[dict[str, Array]]:
    """Return samples that lie apart, as those of different requests do."""
    shapes = engine.manifest.shapes_of_batch(1)
    return [random_inputs(engine.inputs, shapes, seed=seed) for seed in range(count)]


def _takes(engine: Engine, size: int) -> bool:
    profiles = [profile.values() for profile in engine.manifest.profiles if profile]
    return not profiles or any(all(s.min[0] <= size <= s.max[0] for s in profile) for profile in profiles)
