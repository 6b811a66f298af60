"""Handing a fixed set of items to whoever waits longest."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Generic, TypeVar

from trtdeploy.errors import EngineBusyError, EngineClosedError

T = TypeVar("T")


class FairPool(Generic[T]):
    """Items that are held by one holder at a time and handed on first come, first served.

    Thread-safe. ``request`` never blocks, so that asyncio code can wait for an item without a thread of its own.

    Args:
        items: What is handed out.
        what: What a message calls one item.
    """

    def __init__(self, items: Iterable[T], *, what: str) -> None:
        self._free = deque(items)
        self._size = len(self._free)
        self._what = what
        self._waiting: deque[Future[T]] = deque()
        self._condition = threading.Condition()
        self._closed = False

    def acquire(self, timeout_s: float | None) -> T:
        """Wait for an item; None waits for ever.

        Raises:
            EngineBusyError: None became free in time.
            EngineClosedError: The pool was closed before or meanwhile.
        """
        with self._condition:
            if self._free and not self._waiting and not self._closed:
                return self._free.popleft()
        waiter = self.request()
        try:
            return waiter.result(timeout_s)
        except FutureTimeoutError:
            if waiter.cancel():
                raise self.busy(timeout_s) from None
            return waiter.result()  # it arrived between the two calls
        except BaseException:
            # Ctrl-C while waiting: an item that arrives now must not be lost
            if not waiter.cancel() and waiter.exception() is None:
                self.release(waiter.result())
            raise

    def take(self) -> T | None:
        """Return an item if one is free now and nobody waits for it, else None; ``release`` it afterwards.

        Raises:
            EngineClosedError: The pool was closed.
        """
        with self._condition:
            if self._closed:
                raise self.closed_error()
            return self._free.popleft() if self._free and not self._waiting else None

    def request(self) -> Future[T]:
        """Return a future of an item; cancel it to stop waiting, else ``release`` its result."""
        waiter: Future[T] = Future()
        with self._condition:
            if self._closed:
                waiter.set_exception(self.closed_error())
            elif self._free and not self._waiting:
                waiter.set_running_or_notify_cancel()
                waiter.set_result(self._free.popleft())
            else:
                self._waiting.append(waiter)
        return waiter

    def release(self, item: T) -> None:
        """Give an item back; it goes to whoever waits longest."""
        with self._condition:
            while self._waiting:
                waiter = self._waiting.popleft()
                if waiter.set_running_or_notify_cancel():
                    break
            else:
                self._free.append(item)
                self._condition.notify_all()
                return
        # outside of the lock: callbacks of the future may use the pool
        waiter.set_result(item)

    def refuse(self) -> None:
        """Fail whoever waits, and every request from now on, with ``EngineClosedError``."""
        with self._condition:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
        for waiter in waiting:
            if waiter.set_running_or_notify_cancel():
                waiter.set_exception(self.closed_error())

    def drain(self, timeout_s: float | None) -> None:
        """Wait until every item has been released.

        Raises:
            EngineBusyError: One was not released in time.
        """
        with self._condition:
            if not self._condition.wait_for(lambda: len(self._free) == self._size, timeout_s):
                raise EngineBusyError(
                    f"{self._size - len(self._free)} of {self._size} {self._what}s were still in use after "
                    f"{timeout_s:g} s.",
                    hint="End all leases and wait for running inferences before closing.",
                )

    def busy(self, timeout_s: float | None) -> EngineBusyError:
        """Return the error of a wait that took too long."""
        within = "in time" if timeout_s is None else f"within {timeout_s:g} s"
        return EngineBusyError(
            f"No {self._what} became free {within}; all {self._size} are in use.",
            hint="Load the engine with more contexts, send fewer requests at once, or raise timeout_s.",
        )

    @staticmethod
    def closed_error() -> EngineClosedError:
        """Return the error of a request to a closed engine."""
        return EngineClosedError("The engine is closed.", hint="Load it again: Engine.load(PLAN).")
