"""Measuring a plan on this machine: latency percentiles and throughput over batch sizes and numbers of contexts."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from trtdeploy.engine import Engine
from trtdeploy.errors import UsageError
from trtdeploy.plan import read_manifest
from trtdeploy.statistics import Interval, percentile
from trtdeploy.tensors import Array, random_inputs

PERCENTILES = (50.0, 90.0, 95.0, 99.0)


class Measurement(BaseModel):
    """One point of a sweep.

    Attributes:
        batch: Size of the first dimension of every input.
        contexts: Inferences running at the same time.
        threads: Threads of one inference; None where the build's choice was used.
        inferences: How many were timed.
        latency_ms: Percentiles of one inference, with 95% intervals.
        throughput_per_s: Samples per second over all contexts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: int
    contexts: int
    threads: int | None
    inferences: int
    latency_ms: dict[str, Interval]
    throughput_per_s: float


def bench(
    plan: str | Path,
    *,
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] = (1,),
    threads: int | None = None,
    warm_up_s: float = 0.5,
    duration_s: float = 3.0,
    progress: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """Run a plan with random inputs, as a closed loop: every context starts its next inference when one ends.

    Args:
        plan: The plan.
        batches: Batch sizes to measure.
        contexts: Numbers of contexts to measure.
        threads: Threads of one inference, on a CPU.
        warm_up_s: Seconds that are run but not counted, per point.
        duration_s: Seconds that are counted, per point.
        progress: Called with a description of the point that begins.

    Raises:
        UsageError: A number is out of range.
        ShapeError: The plan does not take a batch size.
        PlanError: The plan cannot be loaded.
    """
    if min(min(batches, default=0), min(contexts, default=0)) < 1:
        raise UsageError("At least one batch size and one number of contexts are needed, and they must be positive.")
    if not 0 < duration_s < math.inf or not 0 <= warm_up_s < math.inf:
        raise UsageError(f"duration_s={duration_s} must be positive, warm_up_s={warm_up_s} not negative; both finite.")
    manifest = read_manifest(plan)
    inputs = {batch: random_inputs(manifest.inputs, manifest.shapes_of_batch(batch)) for batch in batches}
    results: list[Measurement] = []
    for count in contexts:
        with Engine.load(plan, contexts=count, threads=threads, timeout_s=None) as engine:
            for batch in batches:
                if progress:
                    progress(f"batch {batch}, {count} context{'s' if count > 1 else ''}")
                engine.infer(inputs[batch])  # refuses the shape before the threads start
                times, seconds = _closed_loop(engine, inputs[batch], count, warm_up_s, duration_s)
                results.append(
                    Measurement(
                        batch=batch,
                        contexts=count,
                        threads=threads,
                        inferences=len(times),
                        latency_ms={f"p{q:g}": percentile(times, q) for q in PERCENTILES},
                        throughput_per_s=batch * len(times) / seconds,
                    )
                )
    return results


def _closed_loop(
    engine: Engine, inputs: dict[str, Array], workers: int, warm_up_s: float, duration_s: float
) -> tuple[list[float], float]:
    """Return the milliseconds of every counted inference and the seconds that they took together."""
    times: list[list[float]] = [[] for _ in range(workers)]
    failures: list[BaseException] = []
    begin = time.perf_counter() + warm_up_s
    end = begin + duration_s

    def run(index: int) -> None:
        try:
            while True:
                start = time.perf_counter()
                if start >= end and times[index]:
                    return
                engine.infer(inputs)
                if start >= begin:
                    times[index].append(1e3 * (time.perf_counter() - start))
        except BaseException as error:  # raised again in the caller's thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [value for values in times for value in values], time.perf_counter() - begin
