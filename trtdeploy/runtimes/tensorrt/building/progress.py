"""Progress of a build, and the way to cancel it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from trtdeploy.runtimes.base import BuildProgress

if TYPE_CHECKING:
    import tensorrt

T = TypeVar("T")


class Cancellation:
    """A flag that a build looks at after every step."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Ask the build to end."""
        self._event.set()

    @property
    def wanted(self) -> bool:
        """Whether somebody asked."""
        return self._event.is_set()


def make_monitor(
    module: ModuleType, progress: BuildProgress | None, cancellation: Cancellation
) -> tensorrt.IProgressMonitor:
    """Make a monitor that reports phases and cancels.

    TensorRT calls it from threads of its own, through C++ frames that no exception may cross: what ``progress`` raises
    cancels the build and is kept in ``failure``.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = module
    steps: dict[str, int] = {}
    lock = threading.Lock()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,unused-ignore]  # unknown where TensorRT is missing
        failure: BaseException | None = None

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # type: ignore[override,unused-ignore]
            with lock:
                steps[phase_name] = num_steps
            self._tell(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:  # type: ignore[override,unused-ignore]
            self._tell(phase_name, step + 1, steps.get(phase_name, step + 1))
            return not cancellation.wanted

        def phase_finish(self, phase_name: str) -> None:
            with lock:
                total = steps.pop(phase_name, 1)
            self._tell(phase_name, total, total)

        def _tell(self, phase: str, done: int, total: int) -> None:
            if progress is None or cancellation.wanted:
                return
            try:
                with lock:
                    progress(phase, done, max(total, 1))
            except BaseException as error:
                self.failure = error
                cancellation.cancel()

    return Monitor()


def run_cancellable(work: Callable[[], T], cancellation: Cancellation) -> T:
    """Run ``work`` in a thread of its own and wait; on Ctrl-C cancel it, wait for its end and raise.

    In the main thread itself Python could not run a signal's handler before TensorRT returns.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []
    # not Thread.join: interrupted, it takes the thread for ended (fixed in Python 3.13)
    ended = threading.Event()

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # raised again in the caller's thread
            failure.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="trtdeploy-build")
    try:
        thread.start()
        ended.wait()
    except BaseException:
        cancellation.cancel()
        while thread.ident is not None and not ended.is_set():
            # a second Ctrl-C changes nothing: TensorRT cannot be left in the middle of a build
            with suppress(KeyboardInterrupt):
                ended.wait()
        raise
    finally:
        if ended.is_set():
            thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
