"""A plan loaded into TensorRT: deserialization, what all contexts share, and the order of destruction."""

from __future__ import annotations

import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from trtdeploy.cuda.arrays import DeviceArray, import_device_array
from trtdeploy.cuda.device import Device
from trtdeploy.cuda.memory import DevicePool
from trtdeploy.cuda.streams import Stream
from trtdeploy.errors import CudaError, EngineClosedError, UsageError
from trtdeploy.runtimes.base import LoadedEngine
from trtdeploy.runtimes.config import LoadOptions
from trtdeploy.runtimes.tensorrt.bindings import Bindings
from trtdeploy.runtimes.tensorrt.execution.arena import Arena
from trtdeploy.runtimes.tensorrt.execution.context import TensorRTContext
from trtdeploy.runtimes.tensorrt.execution.deserialization import deserialize
from trtdeploy.runtimes.tensorrt.execution.execution_contexts import ContextFactory
from trtdeploy.runtimes.tensorrt.execution.io_tensors import engine_profiles, engine_tensors
from trtdeploy.runtimes.tensorrt.execution.result_memory import ResultMemory

if TYPE_CHECKING:
    import tensorrt

# Memory that the pool keeps when its buffers are freed, so that a serving process allocates nothing in steady state.
_KEPT_BYTES = 1 << 30


class TensorRTEngine(LoadedEngine):
    """A deserialized plan on one GPU.

    Args:
        bindings: The library.
        content: The plan.
        options: How to load it.
        device: The GPU.
    """

    def __init__(self, bindings: Bindings, content: bytes, options: LoadOptions, device: Device) -> None:
        if options.runtime_cache is not None and bindings.flavour.name != "tensorrt-rtx":
            raise UsageError(
                f"{bindings.flavour.title} compiles nothing at run time: runtime_cache means nothing to it.",
                hint="Leave it out.",
            )
        self._bindings = bindings
        self._options = options
        self._device = device
        self._lock = threading.Lock()
        self._closed = False
        self._plan_bytes = len(content)
        self._contexts: list[TensorRTContext] = []
        self._arena: Arena | None = None
        with device.use():
            self._load(content)

    def _load(self, content: bytes) -> None:
        bindings, options, device = self._bindings, self._options, self._device
        self._runtime, self._engine = deserialize(bindings, content, options)
        # before anything else is made: of a plan that cannot be run nothing is left
        self._tensors = engine_tensors(bindings, self._engine)
        self._profiles = engine_profiles(self._engine, self._tensors)
        _set_weight_streaming(self._engine, options)
        # what is entered here is released in the opposite order, also if the rest of this fails
        with ExitStack() as stack:
            self._import_stream = Stream(device)
            stack.callback(self._import_stream.close)
            self._results = ResultMemory(device)
            stack.callback(self._results.close)
            self._pool = DevicePool(device, release_threshold_bytes=_KEPT_BYTES)
            stack.callback(self._pool.close)
            self._factory = ContextFactory(bindings, self._engine, options, device)
            stack.callback(self._destroy)
            if options.activations == "shared":
                self._arena = Arena(device, self._pool, self._import_stream, self._factory.activation_bytes)
                stack.callback(self._arena.close)
            stack.callback(self._factory.close)
            self._resources = stack.pop_all()

    @property
    def asynchronous(self) -> bool:  # type: ignore[override]  # it may change: see below
        """Whether an enqueue returns at once: not if weights are streamed, or sizes depend on the data."""
        return not self._factory.streams_weights and not any(context.waits for context in list(self._contexts))

    def create_context(self) -> TensorRTContext:
        with self._lock, self._device.use():
            context = TensorRTContext(
                self._bindings,
                self._factory.create(),
                tensors=self._tensors,
                profiles=self._profiles,
                device=self._device,
                pool=self._pool,
                results=self._results,
                arena=self._arena,
                cuda_graphs=0 if self._factory.captures_graphs_itself else self._options.cuda_graphs,
                streams_weights=self._factory.streams_weights,
            )
            self._contexts.append(context)
            return context

    def enter_thread(self) -> None:
        # If it fails, so does the thread's first inference, which says why.
        with suppress(CudaError):
            self._device.make_current()

    def import_array(self, name: str, value: Any) -> DeviceArray | None:
        """Return a view of an array that lies on this GPU; None for what is no device array.

        Raises:
            DtypeError: It lies on another device, or is not contiguous.
            EngineClosedError: The engine is closed.
        """
        with self._lock:  # the stream must not be closed meanwhile
            if self._closed:
                raise EngineClosedError("The engine is closed.", hint="Load it again: Engine.load(PLAN).")
            return import_device_array(name, value, self._device, self._import_stream)

    def memory(self) -> dict[str, int]:
        with self._lock, self._device.use():
            if self._closed:
                return {}
            report = {
                "plan": self._plan_bytes,
                "device pool, not in use": self._pool.reserved_bytes - self._pool.used_bytes + self._results.kept_bytes,
                "outputs on the device that somebody holds": self._results.used_bytes,
            }
            if self._arena is not None:
                report["activations, shared"] = self._arena.nbytes
            for number, context in enumerate(self._contexts):
                if self._arena is None:
                    report[f"context {number}, activations"] = self._factory.activation_bytes
                for owner, nbytes in context.memory().items():
                    report[f"context {number}, {owner}"] = nbytes
        return report

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with self._device.use():
                self._contexts.clear()
                self._resources.close()

    def _destroy(self) -> None:
        """TensorRT's rule: contexts, then the engine, then the runtime. The contexts have been closed before."""
        del self._engine
        del self._runtime


def _set_weight_streaming(engine: tensorrt.ICudaEngine, options: LoadOptions) -> None:
    """Set how many bytes of weights stay on the GPU; it can only be changed before there are contexts."""
    if options.weight_streaming_bytes is None:
        return
    if not engine.streamable_weights_size:
        raise UsageError(
            "The plan was not built with weight streaming: weight_streaming_bytes means nothing to it.",
            hint="Leave it out, or build with --weight-streaming.",
        )
    engine.weight_streaming_budget_v2 = min(options.weight_streaming_bytes, engine.streamable_weights_size)
