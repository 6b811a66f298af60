"""CUDA graphs: capture, replay, and a cache of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from trtdeploy.cuda.api import CudaApi
from trtdeploy.cuda.device import Device
from trtdeploy.cuda.streams import Event, Stream
from trtdeploy.errors import CudaError, GraphCaptureError, TrtDeployError


class Graph:
    """Captured work that is launched as a whole. It holds addresses and shapes as they were.

    Args:
        device: The GPU.
        executable: What ``cudaGraphInstantiate`` gave.
        done: Recorded after every launch.
    """

    def __init__(self, device: Device, executable: Any, done: Event) -> None:
        self._device = device
        self._executable = executable
        self._done = done
        self._launched = False

    def launch(self, stream: Stream) -> None:
        """Enqueue it on a stream."""
        self._device.api.call("cudaGraphLaunch", self._executable, stream.native)
        stream.record(self._done)
        self._launched = True

    def close(self) -> None:
        """Release it, once its last launch is done."""
        if self._launched:
            self._done.synchronize()
        self._device.api.call("cudaGraphExecDestroy", self._executable)
        self._done.close()


def capture(stream: Stream, enqueue: Callable[[], bool]) -> Graph:
    """Capture what ``enqueue`` gives to ``stream``; nothing of it runs.

    Args:
        stream: The stream.
        enqueue: Gives work to it; returns False if it could not.

    Raises:
        GraphCaptureError: The work cannot be captured; the message says why. The stream can be used as before.
    """
    # with another device current the capture would succeed, and be empty
    with stream.device.use():
        return _capture(stream, enqueue)


def _capture(stream: Stream, enqueue: Callable[[], bool]) -> Graph:
    api, runtime = stream.device.api, stream.device.api.runtime
    # other threads go on calling CUDA: only this one is restricted
    api.call("cudaStreamBeginCapture", stream.native, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
    failure: BaseException | None = None
    accepted = False
    try:
        accepted = enqueue()
    except BaseException as error:  # whatever it is, Ctrl-C too: the stream must not stay in capture
        failure = error
    graph, reason = _end_capture(stream)
    if failure is not None or not accepted or reason:
        if graph is not None:
            api.call("cudaGraphDestroy", graph)
        if failure is not None and not isinstance(failure, Exception):
            raise failure
        why = _reason_of(failure) or reason or "the work was refused during capture"
        raise GraphCaptureError(f"The work cannot be captured as a CUDA graph: {why}") from failure
    try:
        if not _count_nodes(api, graph):
            raise GraphCaptureError(
                "The captured CUDA graph is empty: another device was current, or nothing was given."
            )
        done = Event(stream.device)
        try:
            return Graph(stream.device, api.call("cudaGraphInstantiate", graph, 0), done)
        except CudaError as error:
            done.close()
            raise GraphCaptureError(f"The captured CUDA graph cannot be instantiated: {error.message}") from error
    finally:
        api.call("cudaGraphDestroy", graph)


def _end_capture(stream: Stream) -> tuple[Any, str]:
    api = stream.device.api
    try:
        return api.call("cudaStreamEndCapture", stream.native), ""
    except CudaError as error:
        api.clear_last_error()
        return None, error.message


def _reason_of(failure: BaseException | None) -> str:
    if failure is None:
        return ""
    return failure.message if isinstance(failure, TrtDeployError) else f"{type(failure).__name__}: {failure}"


def _count_nodes(api: CudaApi, graph: Any) -> int:
    """Return how many nodes a graph has; with no room for them given, CUDA says the number alone."""
    answer = api.call("cudaGraphGetNodes", graph, 0)
    return int(answer[-1] if isinstance(answer, tuple) else answer)


class GraphCache:
    """The most recently used graphs; the others are released.

    Args:
        device: The GPU.
        capacity: How many are kept.
    """

    def __init__(self, device: Device, capacity: int) -> None:
        self._device = device
        self._capacity = capacity
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._captured = self._launched = self._evicted = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def get(self, key: Hashable) -> Graph | None:
        """Return the graph of a key, if there is one."""
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
        return graph

    def put(self, key: Hashable, graph: Graph) -> None:
        """Keep a graph; the one that was not used for longest goes if there are too many."""
        self._graphs[key] = graph
        self._captured += 1
        if len(self._graphs) > self._capacity:
            _, oldest = self._graphs.popitem(last=False)
            oldest.close()
            self._evicted += 1

    def launch(self, graph: Graph, stream: Stream) -> None:
        """Enqueue a graph and count it."""
        graph.launch(stream)
        self._launched += 1

    def counts(self) -> dict[str, int]:
        """Return how many were captured, launched and evicted, and how many there are."""
        return {
            "captured": self._captured,
            "launched": self._launched,
            "evicted": self._evicted,
            "kept": len(self._graphs),
        }

    def clear(self) -> None:
        """Release all, once their last launches are done."""
        while self._graphs:
            self._graphs.popitem()[1].close()
