"""When requests are sent: as soon as one is answered (closed loop), or at times that no answer changes (open loop)."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

Send = Callable[[int], object]
"""Sends request number ``i`` and waits for its answer."""
_WAIT_S = 0.05


@dataclass(frozen=True)
class Sample:
    """One answered request: when it was due and when its answer was there, in seconds of ``time.perf_counter``."""

    due_s: float
    done_s: float


class Traffic:
    """What running senders have produced so far; usable from every thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples: list[Sample] = []
        self._failure: Exception | None = None
        self.stopping = threading.Event()

    def add(self, sample: Sample) -> None:
        """Count an answer."""
        with self._lock:
            self._samples.append(sample)

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
        traffic = Traffic()
        threads = [threading.Thread(target=work, daemon=True) for work in self._workers(send, traffic)]
        for thread in threads:
            thread.start()
        try:
            yield traffic
        finally:
            traffic.stopping.set()
            for thread in threads:
                thread.join()

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
                if not _sent(send, number, due_s, traffic):
                    return
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

    def _workers(self, send: Send, traffic: Traffic) -> list[Callable[[], None]]:
        lock = threading.Lock()
        rng = np.random.default_rng(self._seed)
        start_s = time.perf_counter()
        state = {"number": 0, "due_s": start_s}

        def next_arrival() -> tuple[int, float]:
            with lock:
                state["due_s"] += float(rng.exponential(1 / self._rate_per_s))
                state["number"] += 1
                return int(state["number"]) - 1, float(state["due_s"])

        def worker() -> None:
            while not traffic.stopping.is_set():
                number, due_s = next_arrival()
                while (left_s := due_s - time.perf_counter()) > 0:
                    if traffic.stopping.wait(min(left_s, _WAIT_S)):
                        return
                if not _sent(send, number, due_s, traffic):
                    return

        return [worker] * self._senders


def _sent(send: Send, number: int, due_s: float, traffic: Traffic) -> bool:
    try:
        send(number)
    except Exception as error:  # whatever it is, the caller's thread raises it
        traffic.fail(error)
        return False
    traffic.add(Sample(due_s, time.perf_counter()))
    return True
