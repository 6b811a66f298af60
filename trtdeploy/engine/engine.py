"""A loaded plan with a pool of execution contexts, usable from many threads and from asyncio at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from trtdeploy.engine.arrays import as_arrays
from trtdeploy.engine.lease import Lease
from trtdeploy.engine.memory import MemoryReport
from trtdeploy.engine.pool import FairPool
from trtdeploy.errors import UsageError
from trtdeploy.plan import Manifest, manifest_path, read_manifest, read_plan, read_plan_bytes
from trtdeploy.runtimes import get_runtime
from trtdeploy.runtimes.base import ExecutionContext, LoadedEngine, Pending
from trtdeploy.runtimes.config import LoadOptions, RuntimeName
from trtdeploy.tensors import Array, TensorSpec, check_inputs


class _EngineDefault:
    """Stands for "what the engine was loaded with" where None already means "for ever"."""


_DEFAULT: Final = _EngineDefault()
Timeout = float | None | _EngineDefault


class Engine:
    """A plan, ready to run. Make one with ``Engine.load``; use it as a context manager or call ``close``.

    Thread safety: every method may be called from any thread at any time. ``infer`` and ``lease`` get a context in the
    order in which they ask for one; so do ``submit`` and ``ainfer`` among themselves. Each inference has its context to
    itself, and its outputs are new arrays that stay valid for as long as they are held.
    """

    def __init__(
        self, loaded: LoadedEngine, manifest: Manifest, *, contexts: int, timeout_s: float | None, queue_size: int
    ) -> None:
        self._timeout_s = _checked_seconds(timeout_s)
        self.manifest = manifest
        self._loaded = loaded
        self._contexts = _make_contexts(loaded, contexts)
        self._pool = FairPool(range(contexts), what="execution context")
        self._queue = FairPool(range(contexts + queue_size), what="place in the queue")
        self._executor = ThreadPoolExecutor(
            contexts, thread_name_prefix="trtdeploy-engine", initializer=loaded.enter_thread
        )
        # Who waits for a started inference gives its context back. It must never queue behind a request that waits for
        # just that context, so it has workers of its own, one for each inference that can be under way.
        self._finishers = ThreadPoolExecutor(
            contexts, thread_name_prefix="trtdeploy-finish", initializer=loaded.enter_thread
        )
        self._closing = threading.Lock()
        self._closed = False
        self._in_flight_bytes = [0] * contexts
        self._queued_bytes: dict[int, int] = {}

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        contexts: int = 1,
        threads: int | None = None,
        timeout_s: float | None = 30.0,
        queue_size: int = 256,
        options: LoadOptions | None = None,
        without_manifest: RuntimeName | None = None,
    ) -> Engine:
        """Load a plan.

        Args:
            path: The plan; its manifest must lie beside it.
            contexts: How many inferences may run at the same time.
            threads: Threads of one inference, on a CPU. None takes what the build measured as fastest, divided among
                the contexts.
            timeout_s: How long a request waits for a context before it fails; 0 does not wait, None waits for ever.
            queue_size: How many requests of ``submit`` and ``ainfer`` may wait for a context.
            options: Which GPU, how much memory and what else a plan for a GPU leaves open; ``threads`` wins over its
                own.
            without_manifest: Load a plan that has no manifest, with this runtime: one that trtexec made, say. Nothing
                can be checked before its bytes reach the deserializer, so do it only with plans that you have built.

        Raises:
            PlanCorruptError: Plan or manifest is missing, damaged, or they do not belong together.
            PlanIncompatibleError: The plan was built for another runtime version or another machine.
            RuntimeUnavailableError: The plan's runtime is not installed, or the machine lacks what it needs.
            UsageError: An argument is out of range, or means nothing to the plan's runtime.
        """
        if contexts < 1 or queue_size < 0 or (threads is not None and threads < 1):
            raise UsageError(
                f"contexts={contexts}, threads={threads} and queue_size={queue_size}: contexts and threads must be at "
                "least 1, queue_size at least 0."
            )
        _checked_seconds(timeout_s)
        options = options or LoadOptions()
        if threads is not None:
            options = options.model_copy(update={"threads": threads})
        if without_manifest is not None and not manifest_path(path).exists():
            content = read_plan_bytes(path)
            runtime = get_runtime(without_manifest)
            manifest = runtime.describe(content, options)
            loaded = runtime.load(content, manifest, options)
            return cls(loaded, manifest, contexts=contexts, timeout_s=timeout_s, queue_size=queue_size)
        # The manifest first: it says which runtime may see the bytes, and whether at all.
        manifest = read_manifest(path)
        get_runtime(manifest.runtime.name).check(manifest, options)
        content, manifest = read_plan(path)
        runtime = get_runtime(manifest.runtime.name)
        runtime.check(manifest, options)  # again: both files may have been replaced by others since
        if options.threads is None and contexts > 1 and manifest.tactic is not None:
            options = options.model_copy(update={"threads": manifest.tactic.threads_each(contexts)})
        loaded = runtime.load(content, manifest, options)
        return cls(loaded, manifest, contexts=contexts, timeout_s=timeout_s, queue_size=queue_size)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the plan takes; -1 in a shape is a size chosen per call."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What the plan gives."""
        return self.manifest.outputs

    @property
    def contexts(self) -> int:
        """How many inferences may run at the same time."""
        return len(self._in_flight_bytes)

    def infer(
        self,
        inputs: Mapping[str, Any],
        *,
        timeout_s: Timeout = _DEFAULT,
        outputs: Literal["host", "device"] = "host",
    ) -> dict[str, Any]:
        """Run once in the calling thread and return the outputs by name.

        Args:
            inputs: Arrays by name: numpy, anything with DLPack, or, for a plan on a GPU, with
                ``__cuda_array_interface__``. Dtypes must match exactly.
            timeout_s: How long to wait for a context; None waits for ever.
            outputs: "host" gives numpy arrays; "device" leaves them on the GPU, as arrays that CuPy, Numba, PyTorch and
                JAX read without a copy.

        Raises:
            InputError: An input has the wrong name (``InputNameError``), type or dtype (``DtypeError``) or shape
                (``ShapeError``); nothing has run.
            EngineBusyError: No context became free in time.
            EngineClosedError: The engine is closed.
            InferenceError: The runtime failed.
        """
        return self._run(self._check(inputs), self._seconds(timeout_s), on_device=outputs == "device")

    def submit(
        self, inputs: Mapping[str, Any], *, timeout_s: Timeout = _DEFAULT, copy: bool = True
    ) -> Future[dict[str, Array]]:
        """Queue one inference and return its future. Waits only while the queue is full.

        The future may be cancelled until it starts.

        Args:
            inputs: As for ``infer``.
            timeout_s: How long to wait for a place in the queue and then for a context; None waits for ever.
            copy: Copy the inputs that lie on the host, so that they may be changed at once. Without, they must stay as
                they are until the future is done. Inputs on a GPU are never copied by this: they are read where they
                lie, and must stay as they are until the future is done.

        Raises:
            InputError: As ``infer``, at once and not in the future.
            EngineBusyError: The queue stayed full for ``timeout_s``; in the future: no context became free by then.
            EngineClosedError: The engine is closed.
        """
        seconds = self._seconds(timeout_s)
        deadline = _deadline(seconds)
        arrays = self._check(inputs)
        started = self._start_at_once(arrays)
        if started is not None:
            return started
        slot = self._queue.acquire(seconds)
        return self._dispatch(_copied(arrays) if copy else arrays, slot, deadline, seconds)

    async def ainfer(self, inputs: Mapping[str, Any], *, timeout_s: Timeout = _DEFAULT) -> dict[str, Array]:
        """Run once; the event loop goes on meanwhile. Raises what ``infer`` raises.

        Inputs on the host may be changed as soon as this has been scheduled and waits; those on a GPU are read where
        they lie, and must stay as they are until it is done, or, if it is cancelled, as long as the engine runs it.
        """
        seconds = self._seconds(timeout_s)
        deadline = _deadline(seconds)
        arrays = self._check(inputs)
        # a new shape, or the capture of a graph, may take long: a worker does that
        started = self._start_at_once(arrays, if_quick=True)
        if started is not None:
            return await asyncio.wrap_future(started)
        arrays = _copied(arrays)
        waiter = self._queue.request()
        try:
            # not through the event loop where there is a place: with a timeout of 0 that would be too late
            slot = waiter.result() if waiter.done() else await asyncio.wait_for(asyncio.wrap_future(waiter), seconds)
        except BaseException as error:
            # Cancelled or too late: a place that was given to us all the same goes to the next.
            if not waiter.cancel() and waiter.exception() is None:
                self._queue.release(waiter.result())
            if isinstance(error, asyncio.TimeoutError):
                raise self._queue.busy(seconds) from None
            raise
        return await asyncio.wrap_future(self._dispatch(arrays, slot, deadline, seconds))

    def map(self, batches: Iterable[Mapping[str, Any]], *, in_flight: int | None = None) -> Iterator[dict[str, Array]]:
        """Run many inferences, several at a time, and yield their outputs in the order of the inputs.

        Args:
            batches: Inputs of one inference each; read only as far ahead as ``in_flight``. Those on the host may be
                changed when the next ones are asked for; those on a GPU not before their outputs are there.
            in_flight: How many may be queued or running; twice the contexts if None. They wait for a context for as
                long as it takes.

        Raises:
            UsageError: ``in_flight`` is less than 1.
            TrtDeployError: What ``infer`` raises, when the turn of that inference has come; so does what ``batches``
                itself raises.
        """
        limit = 2 * self.contexts if in_flight is None else in_flight
        if limit < 1:
            raise UsageError(f"in_flight={in_flight}: at least 1 is needed.")
        return self._map(iter(batches), limit)

    @contextmanager
    def lease(self, *, timeout_s: Timeout = _DEFAULT) -> Iterator[Lease]:
        """Have one context alone for the length of a ``with`` block.

        Raises:
            EngineBusyError: No context became free in time.
            EngineClosedError: The engine is closed.
        """
        index = self._pool.acquire(self._seconds(timeout_s))
        lease = Lease(
            self._contexts[index],
            inputs=self.inputs,
            outputs=self.outputs,
            profiles=self.manifest.profiles,
            profile_values=self.manifest.profile_values,
            import_array=self._loaded.import_array,
        )
        try:
            yield lease
        finally:
            lease.end()
            self._pool.release(index)

    def memory_report(self) -> MemoryReport:
        """Return the bytes that the engine holds now, by owner.

        Raises:
            EngineClosedError: The engine is closed: it holds nothing.
        """
        if self._closed:
            raise self._pool.closed_error()
        return MemoryReport(
            runtime=self._loaded.memory(),
            in_flight=tuple(self._in_flight_bytes),
            queued=sum(list(self._queued_bytes.values())),
        )

    def close(self, *, timeout_s: float | None = 30.0) -> None:
        """Wait for running inferences, fail those that wait with ``EngineClosedError``, and release everything.

        Closing twice does nothing.

        Raises:
            EngineBusyError: An inference or a lease did not end within ``timeout_s``; the engine takes no requests any
                more, and ``close`` may be called again.
        """
        timeout_s = _checked_seconds(timeout_s)
        self._queue.refuse()
        self._pool.refuse()
        self._pool.drain(timeout_s)
        self._executor.shutdown(wait=True)
        self._finishers.shutdown(wait=True)
        with self._closing:
            if self._closed:
                return
            self._closed = True
            # whatever fails, all the rest is released
            with ExitStack() as stack:
                stack.callback(self._loaded.close)
                while self._contexts:
                    stack.callback(self._contexts.pop().close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        arrays = as_arrays(inputs, self._loaded.import_array)
        return check_inputs(arrays, self.inputs, self.manifest.profiles, self.manifest.profile_values)

    def _seconds(self, timeout_s: Timeout) -> float | None:
        return self._timeout_s if isinstance(timeout_s, _EngineDefault) else _checked_seconds(timeout_s)

    def _run(
        self, arrays: dict[str, Array], timeout_s: float | None, *, slot: int | None = None, on_device: bool = False
    ) -> dict[str, Any]:
        index = self._pool.acquire(timeout_s)
        try:
            self._in_flight_bytes[index] = _nbytes(arrays)
            if slot is not None:
                self._queued_bytes.pop(slot, None)  # from here on they are in flight
            context = self._contexts[index]
            return context.execute_on_device(arrays) if on_device else context.execute(arrays)
        finally:
            self._give_back(index)

    def _start_at_once(self, arrays: dict[str, Array], *, if_quick: bool = False) -> Future[dict[str, Array]] | None:
        """Start an inference in the caller's thread if the device computes by itself and a context is free now.

        That copies the inputs to where the device reads them, so no other copy is needed; a worker only sleeps until
        the end. None where somebody waits already, no context is free, or ``if_quick`` and it may take long to start.
        """
        if not self._loaded.asynchronous or self._queued_bytes:
            return None
        index = self._pool.take()
        if index is None:
            return None
        try:
            context = self._contexts[index]
            if if_quick and not context.starts_quickly(arrays):
                self._give_back(index)
                return None
            self._in_flight_bytes[index] = _nbytes(arrays)
            pending = context.start(arrays)
        except BaseException:
            self._give_back(index)
            raise
        future: Future[dict[str, Array]] = Future()
        future.set_running_or_notify_cancel()  # it has begun: nobody may cancel it and keep the context
        try:
            self._finishers.submit(self._finish, index, pending, future)
        except RuntimeError:  # they have been shut down meanwhile; it ends here
            self._finish(index, pending, future)
        return future

    def _finish(self, index: int, pending: Pending, future: Future[dict[str, Array]]) -> None:
        try:
            outputs = pending.wait()
        except BaseException as error:
            self._give_back(index)
            future.set_exception(error)
        else:
            # before the result: whoever gets it may ask again at once and finds the context free
            self._give_back(index)
            future.set_result(outputs)

    def _give_back(self, index: int) -> None:
        self._in_flight_bytes[index] = 0
        self._pool.release(index)

    def _dispatch(
        self, arrays: dict[str, Array], slot: int, deadline: float | None, timeout_s: float | None
    ) -> Future[dict[str, Array]]:
        """Hand checked inputs to a worker thread; the place in the queue is free again when the future is done."""
        self._queued_bytes[slot] = _nbytes(arrays)

        def leave_queue(_: object) -> None:
            self._queued_bytes.pop(slot, None)
            self._queue.release(slot)

        def work() -> dict[str, Array]:
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                if timeout_s:
                    raise self._pool.busy(timeout_s)
                remaining = 0.0  # whoever does not want to wait may still find a free context
            return self._run(arrays, remaining, slot=slot)

        try:
            future = self._executor.submit(work)
        except RuntimeError:
            # the executor has been shut down between the two
            leave_queue(None)
            raise self._pool.closed_error() from None
        future.add_done_callback(leave_queue)
        return future

    def _map(self, batches: Iterator[Mapping[str, Any]], limit: int) -> Iterator[dict[str, Array]]:
        running: deque[Future[dict[str, Array]]] = deque()
        more = True
        try:
            while more or running:
                while more and len(running) < limit:
                    try:
                        running.append(self.submit(next(batches), timeout_s=None))
                    except StopIteration:
                        more = False
                    except Exception as error:  # raised below, after the outputs of what came before
                        more = False
                        running.append(_failed(error))
                if running:
                    yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def _make_contexts(loaded: LoadedEngine, count: int) -> list[ExecutionContext]:
    """Make all contexts or none: memory for the last one may be lacking."""
    made: list[ExecutionContext] = []
    try:
        made.extend(loaded.create_context() for _ in range(count))
    except BaseException:
        for context in made:
            context.close()
        loaded.close()
        raise
    return made


def _copied(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Copy host arrays; what lies on a device stays where it is.

    A copy there would have to come before what its owner does next, in a stream that DLPack does not name: only waiting
    for it here could see to that.
    """
    return {name: array.copy() if isinstance(array, np.ndarray) else array for name, array in arrays.items()}


def _failed(error: Exception) -> Future[dict[str, Array]]:
    future: Future[dict[str, Array]] = Future()
    future.set_exception(error)
    return future


def _checked_seconds(timeout_s: float | None) -> float | None:
    """Return a timeout that the operating system can wait for; one beyond that is for ever."""
    if timeout_s is None:
        return None
    if not timeout_s >= 0:
        raise UsageError(f"timeout_s={timeout_s}: at least 0 seconds, or None to wait for ever.")
    return timeout_s if timeout_s < threading.TIMEOUT_MAX else None


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s


def _nbytes(arrays: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in arrays.values())
