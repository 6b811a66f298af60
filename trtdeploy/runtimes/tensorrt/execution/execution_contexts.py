"""Making TensorRT's execution contexts: allocation strategy, and what TensorRT-RTX decides at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtdeploy.cuda.device import Device
from trtdeploy.errors import InferenceError, TimingCacheError, UsageError
from trtdeploy.runtimes.config import LoadOptions
from trtdeploy.runtimes.tensorrt.bindings import Bindings
from trtdeploy.runtimes.tensorrt.stores import runtime_cache_of

if TYPE_CHECKING:
    import tensorrt

    from trtdeploy.timing_cache import BlobCache


class ContextFactory:
    """Makes the execution contexts of one engine.

    Attributes:
        activation_bytes: Scratch memory that one context needs, for the largest shapes of any profile.
        captures_graphs_itself: Whether the library captures CUDA graphs on its own, as TensorRT-RTX does.
        streams_weights: Whether weights are copied during inference, which no CUDA graph can hold.
    """

    def __init__(self, bindings: Bindings, engine: tensorrt.ICudaEngine, options: LoadOptions, device: Device) -> None:
        self._bindings = bindings
        self._engine = engine
        self._shared = options.activations == "shared"
        self.activation_bytes = int(engine.device_memory_size_v2)
        self.captures_graphs_itself = False
        streamable = int(engine.streamable_weights_size)
        self.streams_weights = bool(streamable) and int(engine.weight_streaming_budget_v2) < streamable
        self._runtime_cache: RtxRuntimeCache | None = None
        self._config: tensorrt.IRuntimeConfig | None = None
        if bindings.flavour.name == "tensorrt-rtx":
            self._config = self._rtx_config(options, device)

    def create(self) -> tensorrt.IExecutionContext:
        """Make a context.

        Raises:
            InferenceError: The library refuses, most often for lack of memory.
        """
        with self._bindings.messages.capture() as capture:
            if self._config is not None:
                context: tensorrt.IExecutionContext | None = self._engine.create_execution_context(self._config)
            else:
                context = self._engine.create_execution_context(self._strategy())
            if context is None:
                raise InferenceError(
                    f"{self._bindings.flavour.title} cannot make an execution context, which needs "
                    f"{self.activation_bytes / 1e6:.0f} MB of device memory.",
                    hint="Use fewer contexts, activations='shared', or smaller profiles.",
                    log_lines=capture.lines,
                )
        self._quiet(context)
        return context

    def close(self) -> None:
        """Save what was compiled at run time and let go of the engine."""
        try:
            if self._runtime_cache is not None:
                self._runtime_cache.save()
        finally:
            self._runtime_cache = None
            self._config = None
            del self._engine

    def _quiet(self, context: tensorrt.IExecutionContext) -> None:
        """Emit no NVTX ranges: plans have details for the inspector, which would cost time at every enqueue."""
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self._bindings.trt
        if hasattr(context, "nvtx_verbosity"):
            context.nvtx_verbosity = trt.ProfilingVerbosity.NONE

    def _strategy(self) -> tensorrt.ExecutionContextAllocationStrategy:
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self._bindings.trt
        kinds = trt.ExecutionContextAllocationStrategy
        return kinds.USER_MANAGED if self._shared else kinds.STATIC

    def _rtx_config(self, options: LoadOptions, device: Device) -> tensorrt.IRuntimeConfig:
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self._bindings.trt
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._strategy())
        if hasattr(trt, "CudaGraphStrategy") and hasattr(config, "cuda_graph_strategy"):
            strategies = trt.CudaGraphStrategy
            wanted = strategies.WHOLE_GRAPH_CAPTURE if options.cuda_graphs else strategies.DISABLED
            config.cuda_graph_strategy = wanted
            self.captures_graphs_itself = True
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy") and hasattr(
            config, "dynamic_shapes_kernel_specialization_strategy"
        ):
            choices = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = {
                "lazy": choices.LAZY,
                "eager": choices.EAGER,
                "none": choices.NONE,
            }[options.kernel_specialization]
        if options.runtime_cache is not None:
            store = runtime_cache_of(self._bindings, device, options.runtime_cache)
            self._runtime_cache = RtxRuntimeCache(config, store)
        return config


class RtxRuntimeCache:
    """The kernels that TensorRT-RTX compiles on this GPU, kept between processes."""

    def __init__(self, config: tensorrt.IRuntimeConfig, store: BlobCache) -> None:
        if not hasattr(config, "create_runtime_cache") or not hasattr(config, "set_runtime_cache"):
            raise UsageError("This version of TensorRT-RTX has no runtime cache.")
        self._config = config
        self._store = store
        self._cache = config.create_runtime_cache()
        blob = store.load(self._take)
        if blob:
            self._take(blob)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what was compiled. What another process wrote meanwhile is replaced: it is only compiled again."""
        self._store.merge(bytes(self._cache.serialize()), lambda _, ours: ours, lambda blob: len(blob))

    def _take(self, blob: bytes) -> int:
        """Fill the cache; TensorRT-RTX checks version, GPU and driver.

        Raises:
            TimingCacheError: It refuses.
        """
        if not self._cache.deserialize(blob):
            raise TimingCacheError(
                "TensorRT-RTX refuses the runtime cache: it comes from another version, GPU or driver."
            )
        return len(blob)
