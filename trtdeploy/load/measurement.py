"""Measuring one load in windows until it is stable, never longer than was allowed."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from trtdeploy.errors import ServerError
from trtdeploy.load.arrivals import Arrivals, Sample, Schedule, Send
from trtdeploy.statistics import Interval, percentile
from trtdeploy.validation.target import ServerTimes, ServerTotals

PERCENTILES = (50.0, 90.0, 95.0, 99.0)
STABLE_WINDOWS = 3
_LONGEST = 10
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
    stability_percent: float = Field(default=10.0, gt=0, le=10000)

    def for_rate(self, rate_per_s: float, requests: int) -> WindowOptions:
        """Return windows that hold so many requests of an open loop in three of them; at most ten times as long."""
        needed_s = requests / rate_per_s / STABLE_WINDOWS
        window_s = min(600.0, _LONGEST * self.window_s, max(self.window_s, needed_s))
        return self.model_copy(update={"window_s": window_s})


class LoadPoint(BaseModel):
    """What one load came to, over the last three windows.

    Attributes:
        concurrency: Senders of a closed loop; None in an open loop.
        rate_per_s: Mean rate of an open loop, in requests per second; None in a closed one.
        offered_per_s: Requests per second that really came due, which chance decides; None in a closed loop.
        requests: Requests whose latency was counted: in a closed loop those answered in these windows, in an open one
            those that came due in them.
        unsent: Those among them that nobody was free to send before the end; they count with the time that they had
            waited.
        refused: Requests of the same time that the model's queue refused, because it was full or they had waited for
            too long; they are in no other figure.
        requests_per_s: Answers per second.
        samples_per_s: The same times the samples per request.
        latency_ms: p50, p90, p95 and p99 with 95% intervals; in an open loop from the time a request was due.
        mean_ms: Mean latency.
        server_ms: Means of the server's queue, input, infer and output over about the same requests, and what is left
            for the client and the network; None where the server does not say.
        stable: Whether the last three windows agreed; see ``is_stable`` and ``keeps_pace``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    concurrency: int | None
    rate_per_s: float | None
    offered_per_s: float | None = None
    requests: int
    unsent: int = 0
    refused: int = 0
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
        ServerError: A request failed, or none was answered in the last three windows. What the model's queue refuses
            is no failure: it is counted.
    """
    windows: list[list[Sample]] = []
    ends_s: list[float] = []
    marks: list[ServerTotals | None] = []
    with arrivals.running(send) as traffic:
        traffic.stopping.wait(options.warm_up_s)
        traffic.take()
        ends_s.append(time.perf_counter())
        marks.append(totals())
        stable = False
        while len(windows) < options.max_windows and not stable:
            traffic.stopping.wait(max(0.0, ends_s[-1] + options.window_s - time.perf_counter()))
            windows.append(traffic.take())
            ends_s.append(time.perf_counter())
            marks.append(totals())
            if progress:
                progress(len(windows), options.max_windows)
            stable = _is_stable(windows, ends_s, traffic.schedule, options.stability_percent)
    begin_s, end_s = ends_s[-STABLE_WINDOWS - 1], ends_s[-1]
    last = [sample for window in windows[-STABLE_WINDOWS:] for sample in window]
    due_s: list[float] | None = None
    unsent: list[Sample] = []
    counted = last
    refused = [sample for sample in traffic.refused if begin_s <= sample.done_s < end_s]
    if traffic.schedule is not None:
        # All that came due, not what was answered: the slowest would be missing at the end. Senders have waited for
        # theirs; what nobody was free to send has waited until now at least.
        due_s = traffic.schedule.due_between(begin_s, end_s)
        answered = [*(sample for window in windows for sample in window), *traffic.take()]
        counted = [sample for sample in answered if begin_s <= sample.due_s < end_s]
        refused = [sample for sample in traffic.refused if begin_s <= sample.due_s < end_s]
        sent_s = {sample.due_s for sample in (*counted, *refused)}
        unsent = [Sample(due, end_s) for due in sorted({*due_s} - sent_s)]
    latencies_ms = [1e3 * (sample.done_s - sample.due_s) for sample in [*counted, *unsent]]
    if not last or not latencies_ms:
        raise ServerError(
            f"Not one request was answered in {end_s - begin_s:.1f} s"
            + (f"; the model's queue refused {len(refused)}." if refused else "."),
            hint="Give longer windows, or look at the server.",
        )
    first, final = marks[-STABLE_WINDOWS - 1], marks[-1]
    server = final.since(first) if first is not None and final is not None else None
    per_s = len(last) / (end_s - begin_s)
    mean_ms = float(np.mean(latencies_ms))
    return LoadPoint(
        concurrency=getattr(arrivals, "concurrency", None),
        rate_per_s=arrivals.rate_per_s,
        offered_per_s=len(due_s) / (end_s - begin_s) if due_s is not None else None,
        requests=len(latencies_ms),
        unsent=len(unsent),
        refused=len(refused),
        requests_per_s=per_s,
        samples_per_s=per_s * batch_size,
        latency_ms={f"p{q:g}": percentile(latencies_ms, q) for q in PERCENTILES},
        mean_ms=mean_ms,
        server_ms=_split(mean_ms, server) if server is not None else None,
        stable=stable,
    )


def _is_stable(
    windows: list[list[Sample]], ends_s: list[float], schedule: Schedule | None, stability_percent: float
) -> bool:
    lengths_s = [end - begin for begin, end in pairwise(ends_s)]
    if schedule is None or len(windows) < STABLE_WINDOWS:
        return is_stable(windows, lengths_s, stability_percent)
    due = len(schedule.due_between(ends_s[-STABLE_WINDOWS - 1], ends_s[-1]))
    return keeps_pace(windows, due, stability_percent)


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


def keeps_pace(windows: list[list[Sample]], due: int, stability_percent: float) -> bool:
    """Say whether an open loop has settled: answers keep pace with what came due, and the median latency stays.

    Chance decides how many requests come in a window, so windows of an open loop need not have equally many. Medians
    agree where they lie within ``stability_percent``, or where their 95% intervals overlap: few requests tell no more.
    """
    last = windows[-STABLE_WINDOWS:]
    limit = 1 + stability_percent / 100
    if len(last) < STABLE_WINDOWS or not all(last) or due > limit * sum(map(len, last)):
        return False
    medians = [percentile([sample.done_s - sample.due_s for sample in window], 50) for window in last]
    slowest = max(medians, key=lambda median: median.value)
    fastest = min(medians, key=lambda median: median.value)
    return slowest.value <= limit * fastest.value or slowest.low <= fastest.high


def _split(mean_ms: float, server: ServerTimes) -> dict[str, float]:
    inside = server.queue_ms + server.input_ms + server.infer_ms + server.output_ms
    return {
        "client and network": max(0.0, mean_ms - inside),
        "queue": server.queue_ms,
        "input": server.input_ms,
        "infer": server.infer_ms,
        "output": server.output_ms,
    }
