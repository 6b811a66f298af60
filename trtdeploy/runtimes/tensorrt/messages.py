"""TensorRT's log: into ``logging``, and the last of it into exceptions.

TensorRT accepts one logger per process and ignores later ones, so there is one router per library.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tensorrt

logger = logging.getLogger("trtdeploy.tensorrt")
_KEPT = 12


class Messages:
    """Routes the messages of one library.

    Attributes:
        logger: What the library is given; it must outlive everything that the library makes.
    """

    def __init__(self, module: ModuleType) -> None:
        self._lock = threading.Lock()
        self._captures: list[Capture] = []
        self.logger = _make_logger(module, self._take)

    @contextmanager
    def capture(self) -> Iterator[Capture]:
        """Collect warnings and errors while a block runs. TensorRT logs from threads of its own: all are taken."""
        capture = Capture()
        with self._lock:
            self._captures.append(capture)
        try:
            yield capture
        finally:
            with self._lock:
                self._captures.remove(capture)

    def _take(self, level: int, text: str) -> None:
        logger.log(level, "%s", text)
        if level >= logging.WARNING:
            with self._lock:
                for capture in self._captures:
                    capture.add(level, text)


class Capture:
    """The last warnings and errors of a block, oldest first."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=_KEPT)

    def add(self, level: int, text: str) -> None:
        """Keep one message; one that comes again counts as the last."""
        line = (level, text)
        if line in self._lines:
            self._lines.remove(line)
        self._lines.append(line)

    @property
    def lines(self) -> tuple[str, ...]:
        """All that was kept."""
        return tuple(text for _, text in list(self._lines))

    @property
    def errors(self) -> tuple[str, ...]:
        """Errors only."""
        return tuple(text for level, text in list(self._lines) if level >= logging.ERROR)

    def mentions(self, *words: str) -> bool:
        """Say whether one message contains all of these words."""
        return any(all(word in text for word in words) for text in self.lines)


@functools.cache
def messages_of(module: ModuleType) -> Messages:
    """Return the router of a library; there is one per process."""
    return Messages(module)


def _make_logger(module: ModuleType, take: _Take) -> tensorrt.ILogger:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = module
    severity_of = trt.ILogger.Severity
    levels = {
        int(severity_of.INTERNAL_ERROR): logging.ERROR,
        int(severity_of.ERROR): logging.ERROR,
        int(severity_of.WARNING): logging.WARNING,
        int(severity_of.INFO): logging.INFO,
        int(severity_of.VERBOSE): logging.DEBUG,
    }

    class Router(trt.ILogger):  # type: ignore[misc,unused-ignore]  # its base is unknown where TensorRT is missing
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            take(levels.get(int(severity), logging.INFO), msg)

    return Router()


if TYPE_CHECKING:
    from collections.abc import Callable

    _Take = Callable[[int, str], None]
