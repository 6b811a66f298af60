"""Load against a function that takes a known time; the real server is in the end-to-end tests."""

from __future__ import annotations

import threading
import time

import pytest

from trtdeploy.errors import ServerError
from trtdeploy.load import ClosedLoop, LoadPoint, OpenLoop, WindowOptions, measure, search_rate
from trtdeploy.load.arrivals import Sample
from trtdeploy.load.measurement import is_stable
from trtdeploy.statistics import Interval
from trtdeploy.validation import ServerTotals

QUICK = WindowOptions(warm_up_s=0, window_s=0.15, max_windows=3)


def window(count: int, latency_s: float) -> list[Sample]:
    return [Sample(0.0, latency_s)] * count


@pytest.mark.parametrize(
    ("counts", "latencies", "stable"),
    [
        ((100, 100), (1, 1), False),
        ((100, 105, 109), (1, 1, 1), True),
        ((100, 105, 111), (1, 1, 1), False),
        ((100, 100, 100), (1, 1.05, 1.12), False),
        ((50, 100, 100, 100), (9, 1, 1, 1), True),
        ((100, 0, 100), (1, 1, 1), False),
    ],
)
def test_stability_looks_at_the_last_three_windows(
    counts: tuple[int, ...], latencies: tuple[float, ...], stable: bool
) -> None:
    windows = [window(count, latency) for count, latency in zip(counts, latencies, strict=True)]
    assert is_stable(windows, [1.0] * len(windows), 10) is stable


def test_a_closed_loop_never_has_more_in_flight_than_was_asked_for() -> None:
    lock, flying, most, numbers = threading.Lock(), [0], [0], []

    def send(number: int) -> None:
        with lock:
            flying[0] += 1
            most[0] = max(most[0], flying[0])
            numbers.append(number)
        time.sleep(0.002)
        with lock:
            flying[0] -= 1

    point = measure(send, ClosedLoop(3), QUICK, batch_size=4)
    assert most[0] == 3
    assert len(set(numbers)) == len(numbers)
    assert point.concurrency == 3
    assert point.samples_per_s == pytest.approx(4 * point.requests_per_s)
    assert point.latency_ms["p50"].value >= 2
    assert threading.active_count() < 10


def test_an_open_loop_charges_a_stall_to_every_request_that_came_due_meanwhile() -> None:
    lock, stalled = threading.Lock(), threading.Event()

    def send(number: int) -> None:
        with lock:  # one at a time, like a server with one instance
            if number >= 20 and not stalled.is_set():
                stalled.set()
                time.sleep(0.3)

    options = WindowOptions(warm_up_s=0, window_s=0.25, max_windows=3)
    point = measure(send, OpenLoop(200, seed=1, senders=4), options)
    # four senders are caught in the stall; with coordinated omission only they would be late
    assert stalled.is_set()
    late = point.requests * (1 - 0.9)
    assert late > 8
    assert point.latency_ms["p90"].value > 50
    assert point.rate_per_s == 200


def test_the_server_s_part_is_taken_from_the_counted_windows() -> None:
    asked = []

    def totals() -> ServerTotals:
        asked.append(1)
        n = len(asked)
        return ServerTotals(10 * n, 20_000_000 * n, 0, 10_000_000 * n, 0)

    point = measure(lambda number: time.sleep(0.005), ClosedLoop(1), QUICK, totals=totals)
    assert point.server_ms is not None
    assert (point.server_ms["queue"], point.server_ms["infer"]) == (2, 1)
    assert point.server_ms["client and network"] == pytest.approx(point.mean_ms - 3)


@pytest.mark.parametrize("arrivals", [ClosedLoop(2), OpenLoop(500, senders=4)])
def test_the_first_failure_ends_the_run(arrivals: ClosedLoop | OpenLoop) -> None:
    def send(number: int) -> None:
        if number > 5:
            raise ServerError("gone")

    before = threading.active_count()
    with pytest.raises(ServerError, match="gone"):
        measure(send, arrivals, WindowOptions(warm_up_s=0, window_s=30))
    assert threading.active_count() == before


def test_no_answer_at_all_is_an_error_not_a_zero() -> None:
    with pytest.raises(ServerError, match="Not one request"):
        measure(lambda number: time.sleep(0.4), ClosedLoop(1), WindowOptions(warm_up_s=0, window_s=0.05, max_windows=3))


def point_at(rate: float, capacity: float) -> LoadPoint:
    """A queue with exponential service: p99 of the time in the system is ln(100) / (capacity - rate)."""
    p99 = 1e3 * 4.605 / (capacity - rate) if rate < capacity else 1e6
    level = Interval(value=p99, low=p99, high=p99)
    return LoadPoint(
        concurrency=None,
        rate_per_s=rate,
        requests=100,
        requests_per_s=min(rate, capacity),
        samples_per_s=rate,
        latency_ms={"p99": level},
        mean_ms=p99 / 4.6,
        server_ms=None,
        stable=True,
    )


def test_the_highest_rate_that_keeps_the_promise_is_found() -> None:
    result = search_rate(lambda rate: point_at(rate, 100), p99_ms=100, capacity_per_s=120, steps=8)
    assert result.best is not None
    assert result.best.rate_per_s == pytest.approx(100 - 46.05, abs=120 / 2**7)
    assert len(result.tried) == 8
    assert search_rate(lambda rate: point_at(rate, 100), p99_ms=1, capacity_per_s=120).best is None
