"""When requests are sent: as soon as one is answered (closed loop), or at times that no answer changes (open loop)."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from trtdeploy.triton.client import DeadlineExceededError, QueueFullError

Send = Callable[[int], object]
"""Sends request number ``i`` and waits for its answer."""
_BLOCK = 256
# What a sender of a closed loop waits after a refusal: without a pause, refusals would keep the processors busy.
_REFUSED_PAUSE_S = 0.01


@dataclass(frozen=True)
class Sample:
    """One request: when it was due and when it was answered or refused, in seconds of ``time.perf_counter``."""

    due_s: float
    done_s: float


class Schedule:
    """The times of a Poisson process, in seconds of ``time.perf_counter``; usable from every thread."""

    def __init__(self, rate_per_s: float, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._mean_s = 1 / rate_per_s
        self._lock = threading.Lock()
        self._due_s = [time.perf_counter()]  # the start of the process, which is no request
        self._handed_out = 0

    def next(self) -> tuple[int, float]:
        """Return the next request that nobody has been given: its number and when it is due."""
        with self._lock:
            number, self._handed_out = self._handed_out, self._handed_out + 1
            if len(self._due_s) <= number + 1:
                self._extend()
            return number, self._due_s[number + 1]

    def due_between(self, begin_s: float, end_s: float) -> list[float]:
        """Return when requests were due from ``begin_s`` up to ``end_s``, whether they have been sent or not."""
        with self._lock:
            while self._due_s[-1] < end_s:
                self._extend()
            return self._due_s[max(1, bisect_left(self._due_s, begin_s)) : bisect_left(self._due_s, end_s)]

    def _extend(self) -> None:
        gaps_s = self._rng.exponential(self._mean_s, _BLOCK)
        self._due_s.extend((self._due_s[-1] + np.cumsum(gaps_s)).tolist())


class Traffic:
    """What running senders have produced so far; usable from every thread.

    Args:
        schedule: When requests are due; None where the answers set the pace.
    """

    def __init__(self, schedule: Schedule | None = None) -> None:
        self.schedule = schedule
        self._lock = threading.Lock()
        self._samples: list[Sample] = []
        self._refused: list[Sample] = []
        self._failure: Exception | None = None
        self.stopping = threading.Event()

    def add(self, sample: Sample) -> None:
        """Count an answer."""
        with self._lock:
            self._samples.append(sample)

    def refuse(self, sample: Sample) -> None:
        """Count a request that the model's queue did not take, or did not keep."""
        with self._lock:
            self._refused.append(sample)

    @property
    def refused(self) -> list[Sample]:
        """All requests that were refused so far."""
        with self._lock:
            return list(self._refused)

    def fail(self, error: Exception) -> None:
        """Keep the first failure; it ends the run."""
        with self._lock:
            self._failure = self._failure or error
        self.stopping.set()

    def take(self) -> list[Sample]:
        """Return what was answered since the last call.

        Raises:
            TrtDeployError: A request failed.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            samples, self._samples = self._samples, []
        return samples


class Arrivals(ABC):
    """How requests arrive."""

    @property
    @abstractmethod
    def rate_per_s(self) -> float | None:
        """Requests per second that are offered; None where the answers set the pace."""

    @contextmanager
    def running(self, send: Send) -> Iterator[Traffic]:
        """Send for as long as the block runs; at its end no thread is left, and what is in flight was waited for."""
        traffic = self._traffic()
        threads = [threading.Thread(target=work, daemon=True) for work in self._workers(send, traffic)]
        for thread in threads:
            thread.start()
        try:
            yield traffic
        finally:
            traffic.stopping.set()
            for thread in threads:
                thread.join()

    def _traffic(self) -> Traffic:
        return Traffic()

    @abstractmethod
    def _workers(self, send: Send, traffic: Traffic) -> list[Callable[[], None]]: ...


class ClosedLoop(Arrivals):
    """``concurrency`` senders; each sends the next request when its last one is answered.

    It measures capacity. It hides queueing: a slow server is asked less often.
    """

    def __init__(self, concurrency: int) -> None:
        self.concurrency = concurrency

    @property
    def rate_per_s(self) -> None:
        return None

    def _workers(self, send: Send, traffic: Traffic) -> list[Callable[[], None]]:
        def worker(first: int) -> None:
            number = first
            while not traffic.stopping.is_set():
                due_s = time.perf_counter()
                outcome = _sent(send, number, due_s, traffic)
                if outcome is _Outcome.FAILED:
                    return
                if outcome is _Outcome.REFUSED:
                    traffic.stopping.wait(_REFUSED_PAUSE_S)
                number += self.concurrency

        return [lambda first=first: worker(first) for first in range(self.concurrency)]  # type: ignore[misc]


class OpenLoop(Arrivals):
    """Requests at the times of a Poisson process, whatever the server does.

    Latency counts from the time at which a request was due, not from when a sender was free to send it. A server that
    stalls is therefore charged for every request that came due meanwhile (no coordinated omission).

    Args:
        rate_per_s: Mean rate.
        seed: Of the arrival times.
        senders: Requests that can be in flight; others wait, and their wait counts.
    """

    def __init__(self, rate_per_s: float, *, seed: int = 0, senders: int = 64) -> None:
        self._rate_per_s = rate_per_s
        self._seed = seed
        self._senders = senders

    @property
    def rate_per_s(self) -> float:
        return self._rate_per_s

    def _traffic(self) -> Traffic:
        return Traffic(Schedule(self._rate_per_s, self._seed))

    def _workers(self, send: Send, traffic: Traffic) -> list[Callable[[], None]]:
        schedule = traffic.schedule
        if schedule is None:
            raise ValueError("an open loop needs a schedule")

        def worker() -> None:
            while not traffic.stopping.is_set():
                number, due_s = schedule.next()
                while (left_s := due_s - time.perf_counter()) > 0:
                    if traffic.stopping.wait(left_s):
                        return
                if _sent(send, number, due_s, traffic) is _Outcome.FAILED:
                    return

        return [worker] * self._senders


class _Outcome(Enum):
    ANSWERED = auto()
    REFUSED = auto()
    FAILED = auto()


def _sent(send: Send, number: int, due_s: float, traffic: Traffic) -> _Outcome:
    try:
        send(number)
    except Exception as error:  # whatever it is, the caller's thread raises it
        if _by_the_queue(error):
            traffic.refuse(Sample(due_s, time.perf_counter()))
            return _Outcome.REFUSED
        traffic.fail(error)
        return _Outcome.FAILED
    traffic.add(Sample(due_s, time.perf_counter()))
    return _Outcome.ANSWERED


def _by_the_queue(error: Exception) -> bool:
    """Say whether the model's queue policy has refused a request: a result of the load, not a failure."""
    return isinstance(error, QueueFullError) or (isinstance(error, DeadlineExceededError) and error.dropped_by_server)
