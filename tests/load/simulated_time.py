"""Time that passes only where all threads wait: what a measurement finds does not depend on the machine.

One thread runs at a time. When it waits, the clock jumps to the time at which the first of the others has waited long
enough, and that one goes on; of two at the same time the one that began to wait first.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable


class SimulatedTime:
    """Clock, sleep, threads and events, with the names that the modules ``time`` and ``threading`` have for them."""

    Lock = staticmethod(threading.Lock)

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._order = itertools.count()
        self._waiting: list[tuple[float, int, threading.Semaphore]] = []
        self._turn: dict[int, threading.Semaphore] = {}

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        mine = self._turn.setdefault(threading.get_ident(), threading.Semaphore(0))
        self.wake(mine, self.now_s + seconds)
        self.go_on()
        mine.acquire()

    def wake(self, thread: threading.Semaphore, when_s: float) -> None:
        heapq.heappush(self._waiting, (when_s, next(self._order), thread))

    def go_on(self) -> None:
        """Give the turn to the thread that is next; the caller must wait for its own, or end."""
        when_s, _, thread = heapq.heappop(self._waiting)
        self.now_s = max(self.now_s, when_s)
        thread.release()

    def Event(self) -> SimulatedEvent:
        return SimulatedEvent(self)

    def Thread(self, *, target: Callable[[], None], daemon: bool) -> SimulatedThread:
        return SimulatedThread(self, target)


class SimulatedEvent:
    """``threading.Event``; a waiter looks again and again, in steps that are short against what is measured."""

    STEP_S = 0.001

    def __init__(self, time: SimulatedTime) -> None:
        self._time = time
        self._set = False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout: float) -> bool:
        end_s = self._time.now_s + timeout
        while not self._set and self._time.now_s < end_s:
            self._time.sleep(min(self.STEP_S, end_s - self._time.now_s))
        return self._set


class SimulatedThread:
    """``threading.Thread``; it first runs when the thread that starts it waits."""

    def __init__(self, time: SimulatedTime, target: Callable[[], None]) -> None:
        self._time = time
        self._ended = False
        self._turn = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(target,), daemon=True)

    def start(self) -> None:
        self._time.wake(self._turn, self._time.now_s)
        self._thread.start()

    def join(self) -> None:
        while not self._ended:
            self._time.sleep(SimulatedEvent.STEP_S)
        self._thread.join()

    def _run(self, target: Callable[[], None]) -> None:
        self._turn.acquire()
        try:
            target()
        finally:
            self._ended = True
            self._time.go_on()
