"""Load against a function that takes a known time, on a simulated clock; the real server is in the end-to-end tests."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tests.load.simulated_time import SimulatedTime
from trtdeploy.errors import ServerError
from trtdeploy.load import ClosedLoop, LoadPoint, OpenLoop, WindowOptions, measure, search_rate
from trtdeploy.load import arrivals as arrivals_module
from trtdeploy.load import measurement as measurement_module
from trtdeploy.load.arrivals import Sample
from trtdeploy.load.measurement import is_stable, keeps_pace
from trtdeploy.statistics import Interval
from trtdeploy.triton.client import DeadlineExceededError, QueueFullError
from trtdeploy.validation import ServerTotals

QUICK = WindowOptions(warm_up_s=0, window_s=0.15, max_windows=3)


@pytest.fixture(autouse=True)
def time(monkeypatch: pytest.MonkeyPatch) -> SimulatedTime:
    """What sends, waits and measures has this clock."""
    simulated = SimulatedTime()
    for module in (arrivals_module, measurement_module):
        monkeypatch.setattr(module, "time", simulated)
    monkeypatch.setattr(arrivals_module, "threading", simulated)
    return simulated


class OneAtATime:
    """A server with one instance: a request waits for those before it."""

    def __init__(self, time: SimulatedTime) -> None:
        self._time, self._free_s = time, 0.0

    def serve(self, seconds: float) -> None:
        self._free_s = max(self._free_s, self._time.perf_counter()) + seconds
        self._time.sleep(self._free_s - self._time.perf_counter())


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


def test_a_closed_loop_never_has_more_in_flight_than_was_asked_for(time: SimulatedTime) -> None:
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
    assert point.latency_ms["p50"].value == pytest.approx(2)
    assert threading.active_count() < 10
    assert point.requests_per_s == pytest.approx(1500, rel=0.01)


def test_an_open_loop_charges_a_stall_to_every_request_that_came_due_meanwhile(time: SimulatedTime) -> None:
    stalled, server = threading.Event(), OneAtATime(time)

    def send(number: int) -> None:
        stalls = number >= 20 and not stalled.is_set()
        if stalls:
            stalled.set()
        server.serve(0.3 if stalls else 0)

    options = WindowOptions(warm_up_s=0, window_s=0.25, max_windows=3)
    point = measure(send, OpenLoop(200, seed=1, senders=4), options)
    # four senders are caught in the stall; with coordinated omission only they would be late
    assert stalled.is_set()
    late = point.requests * (1 - 0.9)
    assert late > 8
    assert point.latency_ms["p90"].value > 50
    assert point.rate_per_s == 200


def test_the_server_s_part_is_taken_from_the_counted_windows(time: SimulatedTime) -> None:
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


class Queue:
    """One instance that takes a known time, and a queue of one; more are refused at once."""

    def __init__(self, time: SimulatedTime, service_s: float, error: Callable[[], Exception]) -> None:
        self._places, self._instance = threading.Semaphore(2), OneAtATime(time)
        self._service_s, self._error = service_s, error
        self.refused = 0

    def send(self, number: int) -> None:
        if not self._places.acquire(blocking=False):
            self.refused += 1
            raise self._error()
        try:
            self._instance.serve(self._service_s)
        finally:
            self._places.release()


def late(*, dropped: bool) -> Exception:
    return DeadlineExceededError("too late", dropped_by_server=dropped)


@pytest.mark.parametrize("error", [lambda: QueueFullError("full"), lambda: late(dropped=True)], ids=["full", "dropped"])
def test_what_the_queue_refuses_is_counted_and_no_end(error: Callable[[], Exception], time: SimulatedTime) -> None:
    queue = Queue(time, 0.02, error)
    options = WindowOptions(warm_up_s=0, window_s=0.25, max_windows=3)
    opened = measure(queue.send, OpenLoop(200, seed=1, senders=8), options)
    assert opened.offered_per_s is not None
    assert opened.refused > 0.5 * opened.offered_per_s * 0.75
    assert opened.unsent == 0  # who is refused was sent
    assert opened.requests + opened.refused == pytest.approx(opened.offered_per_s * 0.75, abs=3)
    assert opened.latency_ms["p99"].value < 200
    assert opened.requests_per_s < 60
    assert not opened.stable
    queue = Queue(time, 0.02, error)
    closed = measure(queue.send, ClosedLoop(6), options)
    assert 0 < closed.refused <= queue.refused < 6 * 0.8 / 0.01
    assert closed.requests_per_s == pytest.approx(50, rel=0.4)
    assert measure(Queue(time, 0.001, error).send, ClosedLoop(2), QUICK).refused == 0


def test_a_client_that_gave_up_is_a_failure_and_no_refusal() -> None:
    def send(number: int) -> None:
        raise late(dropped=False)

    with pytest.raises(DeadlineExceededError):
        measure(send, ClosedLoop(1), QUICK)


def test_where_all_are_refused_the_error_says_so() -> None:
    def send(number: int) -> None:
        raise QueueFullError("full")

    with pytest.raises(ServerError, match=r"the model's queue refused \d+"):
        measure(send, ClosedLoop(1), QUICK)


def test_no_answer_at_all_is_an_error_not_a_zero(time: SimulatedTime) -> None:
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
        latency_ms={"p50": Interval(value=p99 / 6.64, low=0, high=p99), "p99": level},
        mean_ms=p99 / 4.6,
        server_ms=None,
        stable=True,
    )


def test_the_highest_rate_that_keeps_the_promise_is_found_and_confirmed_with_more_requests() -> None:
    asked: list[tuple[float, int]] = []

    def measure_rate(rate: float, requests: int) -> LoadPoint:
        asked.append((rate, requests))
        return point_at(rate, 100)

    result = search_rate(measure_rate, p99_ms=100, capacity_per_s=120, steps=8)
    assert result.best is not None
    assert result.best.rate_per_s == pytest.approx(100 - 46.05, abs=120 / 2**7)
    assert {point.rate_per_s for point in result.tried} == {rate for rate, _ in asked}
    assert asked[-1][0] == result.best.rate_per_s
    assert asked[-1][1] > 2 * asked[0][1]
    assert result.confirmations == (result.best,)
    assert search_rate(lambda rate, _: point_at(rate, 100), p99_ms=1, capacity_per_s=120).best is None


def test_a_rate_at_which_the_queue_refuses_requests_does_not_count() -> None:
    def measure_rate(rate: float, requests: int) -> LoadPoint:
        return point_at(rate, 1000).model_copy(update={"refused": 1 if rate > 30 else 0})

    result = search_rate(measure_rate, p99_ms=100, capacity_per_s=100)
    assert result.best is not None
    assert result.best.rate_per_s == pytest.approx(30, abs=100 / 2**5)
    assert all(point.refused == 0 for point in result.confirmations)
    assert any(point.refused for point in result.tried)


def test_one_burst_of_other_work_does_not_mislead_the_search() -> None:
    spoilt = []

    def measure_rate(rate: float, requests: int) -> LoadPoint:
        if not spoilt:  # the very first look, at half of the capacity
            spoilt.append(rate)
            return point_at(rate, rate + 10)
        return point_at(rate, 100)

    result = search_rate(measure_rate, p99_ms=100, capacity_per_s=100)
    assert result.best is not None
    assert result.best.rate_per_s is not None
    assert result.best.rate_per_s > 50


def test_a_rate_that_the_longer_look_does_not_confirm_gives_way_to_the_next() -> None:
    def measure_rate(rate: float, requests: int) -> LoadPoint:
        return point_at(rate, 100 if requests == 100 else 80)

    result = search_rate(measure_rate, p99_ms=200, capacity_per_s=100)
    first, *_, last = result.confirmations
    assert first.latency_ms["p99"].value > 200 >= last.latency_ms["p99"].value
    assert result.best == last
    never = search_rate(lambda rate, n: point_at(rate, 100 if n == 100 else 1), p99_ms=200, capacity_per_s=100)
    assert never.best is None
    assert len(never.confirmations) == 3


def test_a_capacity_that_was_underestimated_is_no_limit() -> None:
    result = search_rate(lambda rate, _: point_at(rate, 100), p99_ms=1000, capacity_per_s=20)
    assert result.best is not None
    assert result.best.rate_per_s is not None
    assert result.best.rate_per_s > 40


def test_requests_that_nobody_was_free_to_send_count_with_the_time_that_they_have_waited(time: SimulatedTime) -> None:
    options = WindowOptions(warm_up_s=0, window_s=0.2, max_windows=3)
    # two senders at 20 ms each: a tenth of what comes due
    point = measure(lambda number: time.sleep(0.02), OpenLoop(1000, senders=2), options)
    assert point.offered_per_s == pytest.approx(1000, rel=0.3)
    assert point.unsent > 0.7 * point.requests
    assert point.requests == pytest.approx(600, rel=0.3)
    assert point.latency_ms["p99"].value > 400
    assert not point.stable


def test_windows_of_an_open_loop_differ_by_chance_and_are_stable_all_the_same(time: SimulatedTime) -> None:
    options = WindowOptions(warm_up_s=0, window_s=0.2, max_windows=3, stability_percent=100)
    point = measure(lambda number: time.sleep(0.02), OpenLoop(40, seed=33), options)  # 6, 16 and 4 requests
    assert point.stable
    assert point.unsent == 0
    assert point.offered_per_s == pytest.approx(26 / 0.6, rel=0.3)


@pytest.mark.parametrize(
    ("counts", "latencies", "due", "stable"),
    [
        ((10, 30, 20), (1, 1, 1), 60, True),
        ((10, 30, 20), (1, 1, 1), 80, False),  # answers fall behind
        ((100, 100, 100), (1, 1.05, 1.3), 300, False),  # and so does the latency
        ((100, 100), (1, 1), 200, False),
        ((100, 0, 100), (1, 1, 1), 200, False),
    ],
)
def test_an_open_loop_is_stable_when_answers_keep_pace(
    counts: tuple[int, ...], latencies: tuple[float, ...], due: int, stable: bool
) -> None:
    windows = [window(count, latency) for count, latency in zip(counts, latencies, strict=True)]
    assert keeps_pace(windows, due, 10) is stable


def test_windows_of_a_slow_rate_are_longer_but_not_without_limit() -> None:
    options = WindowOptions(window_s=1)
    assert options.for_rate(1000, 300).window_s == 1
    assert options.for_rate(50, 300).window_s == pytest.approx(2)
    assert options.for_rate(0.1, 300).window_s == 10
