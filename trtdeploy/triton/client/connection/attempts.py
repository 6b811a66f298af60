"""How long one try of a request may still take, and when to try again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from trtdeploy.triton.client.connection.options import RequestLimits
from trtdeploy.triton.client.errors import Failures, RequestTimeoutError

_FIRST_PAUSE_S = 0.1
_DOUBLINGS = 5
# What the client waits beyond a deadline, so that a server which drops the request can say so.
_GRACE_S = 0.1


@dataclass(frozen=True)
class Try:
    """One try of a request: how long the client waits, and the timeout that the server is told, if any."""

    wait_s: float
    timeout_us: int | None = None


class Patience:
    """The clock of one request with all its tries.

    Args:
        limits: Of the connection.
        has_deadline: Whether the connection's deadline counts: for inference, not for questions about a model.
    """

    def __init__(self, limits: RequestLimits, *, has_deadline: bool = False) -> None:
        self._limits = limits
        self._end_s = time.monotonic() + limits.deadline_s if has_deadline and limits.deadline_s else None

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return self._end_s is not None and time.monotonic() > self._end_s

    @contextmanager
    def keeping_the_deadline(self, failures: Failures, *, drops_late: bool) -> Iterator[None]:
        """Turn an answer that comes after the deadline, or a try that ends after it, into a ``DeadlineExceededError``.

        Args:
            failures: The errors of the connection.
            drops_late: Whether the server drops a request whose deadline has passed.
        """
        try:
            yield
        except RequestTimeoutError as error:
            if self.is_over:
                raise failures.past_deadline(drops_late=drops_late) from error
            raise
        if self.is_over:
            raise failures.past_deadline(drops_late=drops_late)

    def next_try(self) -> Try:
        """Return what is allowed for a try that begins now."""
        if self._end_s is None:
            return Try(self._limits.timeout_s)
        left_s = max(0.0, self._end_s - time.monotonic())
        return Try(min(self._limits.timeout_s, left_s + _GRACE_S), max(1, int(1e6 * left_s)))

    def pauses_s(self, *, may_repeat: bool) -> Iterator[float]:
        """Yield the pause before each further try; it ends where a try would begin after the deadline."""
        for number in range(self._limits.retries if may_repeat else 0):
            pause_s = _FIRST_PAUSE_S * 2 ** min(number, _DOUBLINGS)
            if self._end_s is not None and time.monotonic() + pause_s > self._end_s:
                return
            yield pause_s
