"""Sending a split to a target with several requests in flight."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtdeploy.datasets.dataset import Split
from trtdeploy.errors import ServerError
from trtdeploy.evaluation import Progress, collect
from trtdeploy.ledger import StageOutputs
from trtdeploy.preprocessing import Preprocessing
from trtdeploy.tensors import Array
from trtdeploy.validation.target import Target


@dataclass(frozen=True)
class Answers:
    """What a target answered to a split, in order, and how long each request took."""

    outputs: StageOutputs
    latencies_ms: NDArray[np.float64]
    seconds: float


def ask(
    target: Target,
    split: Split,
    preprocessing: Preprocessing,
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
    starts = range(0, len(split), batch_size)
    answers: list[Array | None] = [None] * len(starts)
    latencies = np.full(len(starts), np.nan)
    work: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(starts)):
        work.put(number)
    failures: list[Exception] = []
    finished = threading.Semaphore(0)
    stopping = threading.Event()

    def send_until_empty() -> None:
        while not stopping.is_set():
            try:
                number = work.get_nowait()
            except queue.Empty:
                return
            try:
                indices = range(starts[number], min(starts[number] + batch_size, len(split)))
                batch = preprocessing.normalise(split.pixels(preprocessing, indices))
                start = time.perf_counter()
                scores = target.scores(batch)
                latencies[number] = 1e3 * (time.perf_counter() - start)
                if len(scores) != len(batch):
                    raise ServerError(f"{target.name} answered {len(scores)} of {len(batch)} samples of a request.")
                answers[number] = scores.reshape(len(batch), -1)
            except Exception as error:  # whatever it is, the caller's thread raises it
                failures.append(error)
                stopping.set()
            finally:
                finished.release()

    begin = time.perf_counter()
    threads = [threading.Thread(target=send_until_empty, daemon=True) for _ in range(min(concurrency, len(starts)))]
    for thread in threads:
        thread.start()
    try:
        done = 0
        while done < len(starts) and not stopping.is_set():
            if finished.acquire(timeout=0.2):
                done += 1
                if progress:
                    progress(min(done * batch_size, len(split)), len(split))
    finally:
        # also on Ctrl-C: no thread may go on using a connection that is about to be closed
        stopping.set()
        for thread in threads:
            thread.join()
    seconds = time.perf_counter() - begin
    if failures:
        raise _with_count(failures[0], answered=sum(answer is not None for answer in answers), total=len(starts))
    scores = [answer for answer in answers if answer is not None]
    return Answers(collect(split, scores, label_map=label_map), latencies, seconds)


def _with_count(error: Exception, *, answered: int, total: int) -> Exception:
    if not isinstance(error, ServerError):
        return error
    return ServerError(
        f"{answered} of {total} requests were answered, then: {error.message}",
        hint=error.hint or "Nothing was recorded. Look at the server's log.",
        log_lines=error.log_lines,
    )
