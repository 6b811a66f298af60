"""Sending a split to a target with several requests in flight, from threads or from the tasks of an event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtdeploy.data.dataset import Split
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import ServerError
from trtdeploy.ledger import StageOutputs
from trtdeploy.ledger.evaluation import Progress, collect
from trtdeploy.tensors import Array
from trtdeploy.validation.target import Target

_LOOK_S = 0.2


@dataclass(frozen=True)
class Answers:
    """What a target answered to a split, in order, and how long each request took."""

    outputs: StageOutputs
    latencies_ms: NDArray[np.float64]
    seconds: float


def ask(
    target: Target,
    split: Split,
    preprocessing: Preprocessing | None,
    *,
    label_map: Sequence[int] | None = None,
    batch_size: int = 1,
    concurrency: int = 4,
    progress: Progress | None = None,
) -> Answers:
    """Send a split with several requests in flight; every answer is kept under the number of its request.

    Raises:
        ServerError: A request failed; the first failure ends the run.
        TrtDeployError: Whatever else the target or the dataset raises.
    """
    run = _Run(target, split, preprocessing, batch_size, progress)
    begin = time.perf_counter()
    if target.loop is not None:
        _ask_from_tasks(run, target.loop, concurrency)
    else:
        _ask_from_threads(run, concurrency)
    seconds = time.perf_counter() - begin
    return Answers(collect(split, run.in_order(), label_map=label_map), run.latencies_ms, seconds)


class _Run:
    """The requests of one run: what is left to send, and what was answered. Usable from every thread."""

    def __init__(
        self,
        target: Target,
        split: Split,
        preprocessing: Preprocessing | None,
        batch_size: int,
        progress: Progress | None,
    ) -> None:
        self.target = target
        self._split = split
        self._preprocessing = preprocessing
        self._batch_size = batch_size
        self._starts = range(0, len(split), batch_size)
        self._answers: list[Array | None] = [None] * len(self._starts)
        self.latencies_ms = np.full(len(self._starts), np.nan)
        self._progress = progress
        self.left: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(len(self._starts)):
            self.left.put(number)
        self.failures: list[Exception] = []

    def __len__(self) -> int:
        return len(self._starts)

    def prepare(self, number: int) -> Array:
        """Return the input of a request."""
        start = self._starts[number]
        indices = range(start, min(start + self._batch_size, len(self._split)))
        return self.target.prepare(self._split, self._preprocessing, indices)

    def keep(self, number: int, batch: Array, scores: Array, latency_ms: float) -> None:
        """Keep an answer.

        Raises:
            ServerError: It has not one row per sample.
        """
        if len(scores) != len(batch):
            raise ServerError(f"{self.target.name} answered {len(scores)} of {len(batch)} samples of a request.")
        self.latencies_ms[number] = latency_ms
        self._answers[number] = scores.reshape(len(batch), -1)

    def show(self, done: int) -> None:
        """Show that so many requests have ended."""
        if self._progress:
            self._progress(min(done * self._batch_size, len(self._split)), len(self._split))

    def in_order(self) -> list[Array]:
        """Return all answers.

        Raises:
            ServerError: A request failed.
            TrtDeployError: Likewise.
        """
        if self.failures:
            raise self._with_count(self.failures[0])
        return [answer for answer in self._answers if answer is not None]

    def _with_count(self, error: Exception) -> Exception:
        if not isinstance(error, ServerError):
            return error
        answered = sum(answer is not None for answer in self._answers)
        error.message = f"{answered} of {len(self)} requests were answered, then: {error.message}"
        error.hint = error.hint or "Nothing was recorded. Look at the server's log."
        return error


def _ask_from_threads(run: _Run, concurrency: int) -> None:
    finished = threading.Semaphore(0)
    stopping = threading.Event()

    def send_until_empty() -> None:
        while not stopping.is_set():
            try:
                number = run.left.get_nowait()
            except queue.Empty:
                return
            try:
                batch = run.prepare(number)
                start = time.perf_counter()
                scores = run.target.scores(batch)
                run.keep(number, batch, scores, 1e3 * (time.perf_counter() - start))
            except Exception as error:  # whatever it is, the caller's thread raises it
                run.failures.append(error)
                stopping.set()
            finally:
                finished.release()

    threads = [threading.Thread(target=send_until_empty, daemon=True) for _ in range(min(concurrency, len(run)))]
    for thread in threads:
        thread.start()
    try:
        done = 0
        while done < len(run) and not stopping.is_set():
            if finished.acquire(timeout=_LOOK_S):
                done += 1
                run.show(done)
    finally:
        # also on Ctrl-C: no thread may go on using a connection that is about to be closed
        stopping.set()
        for thread in threads:
            thread.join()


def _ask_from_tasks(run: _Run, loop: asyncio.AbstractEventLoop, concurrency: int) -> None:
    done = 0

    async def send_until_empty() -> None:
        nonlocal done
        while not run.failures:
            try:
                number = run.left.get_nowait()
            except queue.Empty:
                return
            try:
                # decoding images would keep the loop from its answers
                batch = await asyncio.to_thread(run.prepare, number)
                start = time.perf_counter()
                scores = await run.target.awaited_scores(batch)
                run.keep(number, batch, scores, 1e3 * (time.perf_counter() - start))
            except Exception as error:  # whatever it is, the caller's thread raises it
                run.failures.append(error)
            done += 1

    async def send_all() -> None:
        await asyncio.gather(*(send_until_empty() for _ in range(min(concurrency, len(run)))))

    future = asyncio.run_coroutine_threadsafe(send_all(), loop)
    try:
        while True:
            try:
                future.result(timeout=_LOOK_S)
                break
            except concurrent.futures.TimeoutError:
                run.show(done)
    finally:
        future.cancel()  # on Ctrl-C; nothing otherwise
    run.show(done)
