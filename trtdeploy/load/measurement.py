"""Measuring one load in windows until it is stable, never longer than was allowed."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from trtdeploy.errors import ServerError
from trtdeploy.load.arrivals import Arrivals, Sample, Send
from trtdeploy.statistics import Interval, percentile
from trtdeploy.validation.target import ServerTimes, ServerTotals

PERCENTILES = (50.0, 90.0, 95.0, 99.0)
STABLE_WINDOWS = 3
Totals = Callable[[], ServerTotals | None]


class WindowOptions(BaseModel):
    """How long to look.

    Attributes:
        warm_up_s: Load before the first window; not counted.
        window_s: Length of a window.
        max_windows: After so many windows the load counts as not stable.
        stability_percent: How far the last three windows may differ. Source: perf_analyzer's default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    warm_up_s: float = Field(default=1.0, ge=0, le=600)
    window_s: float = Field(default=2.0, gt=0, le=600)
    max_windows: int = Field(default=10, ge=STABLE_WINDOWS, le=1000)
    stability_percent: float = Field(default=10.0, gt=0, le=100)


class LoadPoint(BaseModel):
    """What one load came to, over the last three windows.

    Attributes:
        concurrency: Senders of a closed loop; None in an open loop.
        rate_per_s: Offered requests per second of an open loop; None in a closed one.
        requests: Answers that were counted.
        requests_per_s: Answers per second.
        samples_per_s: The same times the samples per request.
        latency_ms: p50, p90, p95 and p99 with 95% intervals; in an open loop from the time a request was due.
        mean_ms: Mean latency.
        server_ms: Means of the server's queue, input, infer and output over about the same requests, and what is left
            for the client and the network; None where the server does not say.
        stable: Whether throughput and median latency of the last three windows agreed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    concurrency: int | None
    rate_per_s: float | None
    requests: int
    requests_per_s: float
    samples_per_s: float
    latency_ms: dict[str, Interval]
    mean_ms: float
    server_ms: dict[str, float] | None
    stable: bool


def measure(
    send: Send,
    arrivals: Arrivals,
    options: WindowOptions,
    *,
    batch_size: int = 1,
    totals: Totals = lambda: None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadPoint:
    """Put a load on a server and measure it.

    Raises:
        ServerError: A request failed, or none was answered in the last three windows.
    """
    windows: list[list[Sample]] = []
    lengths_s: list[float] = []
    marks: list[ServerTotals | None] = []
    with arrivals.running(send) as traffic:
        traffic.stopping.wait(options.warm_up_s)
        traffic.take()
        begin_s = time.perf_counter()
        marks.append(totals())
        while len(windows) < options.max_windows:
            traffic.stopping.wait(options.window_s)
            windows.append(traffic.take())
            now_s = time.perf_counter()
            lengths_s.append(now_s - begin_s)
            begin_s = now_s
            marks.append(totals())
            if progress:
                progress(len(windows), options.max_windows)
            if is_stable(windows, lengths_s, options.stability_percent):
                break
    last = [sample for window in windows[-STABLE_WINDOWS:] for sample in window]
    if not last:
        seconds = sum(lengths_s[-STABLE_WINDOWS:])
        raise ServerError(
            f"Not one request was answered in {seconds:.1f} s.",
            hint="Give longer windows, or look at the server.",
        )
    latencies_ms = [1e3 * (sample.done_s - sample.due_s) for sample in last]
    first, final = marks[-STABLE_WINDOWS - 1], marks[-1]
    server = final.since(first) if first is not None and final is not None else None
    per_s = len(last) / sum(lengths_s[-STABLE_WINDOWS:])
    mean_ms = float(np.mean(latencies_ms))
    return LoadPoint(
        concurrency=getattr(arrivals, "concurrency", None),
        rate_per_s=arrivals.rate_per_s,
        requests=len(last),
        requests_per_s=per_s,
        samples_per_s=per_s * batch_size,
        latency_ms={f"p{q:g}": percentile(latencies_ms, q) for q in PERCENTILES},
        mean_ms=mean_ms,
        server_ms=_split(mean_ms, server) if server is not None else None,
        stable=is_stable(windows, lengths_s, options.stability_percent),
    )


def is_stable(windows: list[list[Sample]], lengths_s: list[float], stability_percent: float) -> bool:
    """Say whether throughput and median latency of the last three windows lie within ``stability_percent``.

    Source: perf_analyzer's inference profiler: largest over smallest of the last three at most 1 + stability; a window
    without an answer is never stable.
    """
    if len(windows) < STABLE_WINDOWS or not all(windows[-STABLE_WINDOWS:]):
        return False
    limit = 1 + stability_percent / 100
    last = list(zip(windows, lengths_s, strict=True))[-STABLE_WINDOWS:]
    rates = [len(window) / length_s for window, length_s in last]
    medians = [float(np.median([sample.done_s - sample.due_s for sample in window])) for window, _ in last]
    return max(rates) <= limit * min(rates) and max(medians) <= limit * min(medians)


def _split(mean_ms: float, server: ServerTimes) -> dict[str, float]:
    inside = server.queue_ms + server.input_ms + server.infer_ms + server.output_ms
    return {
        "client and network": max(0.0, mean_ms - inside),
        "queue": server.queue_ms,
        "input": server.input_ms,
        "infer": server.infer_ms,
        "output": server.output_ms,
    }
