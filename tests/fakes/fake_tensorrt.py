"""A TensorRT that computes with ONNX Runtime on the fake driver's host memory, and checks what a GPU would punish.

``make_fake_tensorrt(cudart)`` returns a module that stands where ``tensorrt`` would. Its plans are ONNX models with
profiles. Work is enqueued on the fake driver's streams, so nothing is computed before the schedule lets it run. What
breaks TensorRT's rules raises ``Misuse`` and is kept in ``module.misuses``: exceptions may be swallowed on their way.
"""

from __future__ import annotations

import ctypes
import enum
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime

from tests.fakes.fake_cudart import FakeCudart
from trtdeploy.tensors import dtype_from_onnx

MAGIC = b"fake-plan"
ALIGNMENT = 256


class Misuse(AssertionError):
    """A rule of TensorRT was broken."""


def make_plan(
    model: onnx.ModelProto,
    profiles: Sequence[dict[str, Sequence[Sequence[int]]]] = (),
    formats: Sequence[dict[str, str]] = (),
) -> bytes:
    """Return plan bytes; each profile has (min, opt, max) by input: of a shape tensor's values, of others' shapes.

    What a profile's formats do not name is linear.
    """
    header = json.dumps({"profiles": list(profiles), "formats": list(formats)}).encode()
    return MAGIC + len(header).to_bytes(4, "little") + header + model.SerializeToString()


def make_fake_tensorrt(
    cudart: FakeCudart, *, version: str = "10.16.1.11", activation_bytes: int = 4096, name: str = "fake_tensorrt"
) -> ModuleType:
    """Return a module with the part of TensorRT's API that running a plan needs."""
    trt: Any = ModuleType(name)
    trt.__version__ = version
    trt.misuses = []
    trt.live_contexts = []
    trt.enqueues = 0
    trt.refuse_profiles = False  # lets a switch fail, as for lack of memory

    def misuse(text: str) -> Misuse:
        error = Misuse(text)
        trt.misuses.append(error)
        return error

    class ILogger:
        Severity = enum.IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)

    class TensorIOMode(enum.Enum):
        NONE, INPUT, OUTPUT = range(3)

    class TensorLocation(enum.Enum):
        DEVICE, HOST = range(2)

    class DataType(enum.Enum):
        FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)

    class ExecutionContextAllocationStrategy(enum.Enum):
        STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)

    class TensorFormat(enum.Enum):
        LINEAR, CHW2, HWC8, CHW4, CHW16, CHW32 = range(6)

    class ProfilingVerbosity(enum.Enum):
        LAYER_NAMES_ONLY, NONE, DETAILED = range(3)

    class IOutputAllocator:
        pass

    class LayerInformationFormat(enum.Enum):
        ONELINE, JSON = range(2)

    class IEngineInspector:
        """Says that every node became a layer of its own, which reads INT8."""

        def __init__(self, model: onnx.ModelProto) -> None:
            self._nodes = [node.name for node in model.graph.node]

        def get_engine_information(self, layer_format: LayerInformationFormat) -> str:
            tensor = {"Name": "t", "Format/Datatype": "Row major Int8 format"}
            layers = [
                {"Name": name, "LayerType": "gemm", "Inputs": [tensor], "Metadata": f"[ONNX Layer: {name}]"}
                for name in self._nodes
            ]
            return json.dumps({"Layers": layers, "Bindings": []})

    class ICudaEngine:
        def __init__(self, content: bytes) -> None:
            length = int.from_bytes(content[len(MAGIC) : len(MAGIC) + 4], "little")
            start = len(MAGIC) + 4
            header = json.loads(content[start : start + length])
            self._profiles, self._formats = header["profiles"], header["formats"]
            self._model = onnx.load_model_from_string(content[start + length :])
            self._tensors = [(value, TensorIOMode.INPUT) for value in self._model.graph.input]
            self._tensors += [(value, TensorIOMode.OUTPUT) for value in self._model.graph.output]
            self.device_memory_size_v2 = activation_bytes
            self.streamable_weights_size = 0
            self.weight_streaming_budget_v2 = 0
            options = onnxruntime.SessionOptions()  # kernels that fuse Q/DQ saturate on some processors
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            self._session = onnxruntime.InferenceSession(
                self._model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            self._contexts = 0
            self._lock = threading.Lock()

        num_io_tensors = property(lambda self: len(self._tensors))
        num_optimization_profiles = property(lambda self: max(1, len(self._profiles)))

        def get_tensor_name(self, index: int) -> str:
            return str(self._tensors[index][0].name)

        def get_tensor_mode(self, name: str) -> TensorIOMode:
            return next(mode for value, mode in self._tensors if value.name == name)

        def get_tensor_dtype(self, name: str) -> DataType:
            return {
                "float32": DataType.FLOAT,
                "float16": DataType.HALF,
                "int64": DataType.INT64,
                "int32": DataType.INT32,
                "int8": DataType.INT8,
                "uint8": DataType.UINT8,
                "bool": DataType.BOOL,
            }[self.dtype(name)]

        def get_tensor_location(self, name: str) -> TensorLocation:
            is_shape = self.get_tensor_mode(name) is TensorIOMode.INPUT and self.dtype(name) == "int64"
            return TensorLocation.HOST if is_shape else TensorLocation.DEVICE

        def get_tensor_format(self, name: str, profile_index: int = 0) -> TensorFormat:
            formats = self._formats[profile_index] if self._formats else {}
            return TensorFormat[formats.get(name, "LINEAR")]

        def get_tensor_format_desc(self, name: str, profile_index: int = 0) -> str:
            return f"{self.get_tensor_format(name, profile_index).name} format"

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
            if self._profiles and name in self._profiles[profile_index] and not self.holds_shape(name):
                return [tuple(shape) for shape in self._profiles[profile_index][name]]
            return [self.shape(name)] * 3

        def get_tensor_profile_values(self, name: int, profile_index: str) -> list[list[int]]:
            """The real one has its arguments' names in the wrong order, too."""
            index, tensor = name, profile_index
            if not self.holds_shape(tensor):
                raise RuntimeError("Binding index does not correspond to an input shape tensor.")
            ranges = self._profiles[index].get(tensor, []) if self._profiles else []
            return [list(values) for values in ranges]

        def holds_shape(self, name: str) -> bool:
            return self.get_tensor_location(name) is TensorLocation.HOST

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self.shape(name)

        def create_engine_inspector(self) -> IEngineInspector:
            return IEngineInspector(self._model)

        def create_execution_context(
            self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
        ) -> IExecutionContext | None:
            with self._lock:  # TensorRT creates contexts one at a time
                self._contexts += 1
            try:
                context = IExecutionContext(self, strategy)
            except MemoryError:
                return None  # TensorRT logs the error and returns nothing
            trt.live_contexts.append(id(context))
            return context

        def dtype(self, name: str) -> str:
            return dtype_from_onnx(self._value(name).type.tensor_type.elem_type)

        def shape(self, name: str) -> tuple[int, ...]:
            dims = self._value(name).type.tensor_type.shape.dim
            return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)

        def names(self, mode: TensorIOMode) -> list[str]:
            return [value.name for value, kind in self._tensors if kind is mode]

        def _value(self, name: str) -> onnx.ValueInfoProto:
            return next(value for value, _ in self._tensors if value.name == name)

        def __del__(self) -> None:
            if self._contexts:
                misuse("the engine was destroyed before its execution contexts")

    class IExecutionContext:
        def __init__(self, engine: ICudaEngine, strategy: ExecutionContextAllocationStrategy) -> None:
            # what the context needs of the engine, not the engine: it must be possible to destroy them in wrong order
            self._engine_ref = [engine]
            self._session = engine._session
            weak = engine

            def leave() -> None:
                weak._contexts -= 1

            self._leave = leave
            self._user_managed = strategy is ExecutionContextAllocationStrategy.USER_MANAGED
            self._scratch: tuple[int, int] | None = None
            if not self._user_managed:
                error, address = cudart.cudaMalloc(activation_bytes)
                if int(error):
                    raise MemoryError("no device memory for the activations")
                self._scratch = (int(address), activation_bytes)
            self._inside = threading.Lock()
            self._profile = 0
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._allocators: dict[str, IOutputAllocator] = {}

        @contextmanager
        def _alone(self) -> Iterator[ICudaEngine]:
            if not self._inside.acquire(blocking=False):
                raise misuse("two threads use one execution context at the same time")
            try:
                yield self._engine_ref[0]
            finally:
                self._inside.release()

        def set_device_memory(self, memory: int, size: int) -> None:
            with self._alone():
                if memory % ALIGNMENT or size < activation_bytes:
                    raise misuse(f"device memory at {memory} of {size} bytes is misaligned or too small")
                self._scratch = (memory, size)

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            with self._alone() as engine:
                # the binding raises where the library returns false
                if not 0 <= profile_index < engine.num_optimization_profiles or trt.refuse_profiles:
                    raise RuntimeError("Error in set optimization profile async.")
                # whether TensorRT keeps any of these is not promised
                self._shapes.clear()
                self._addresses.clear()
                self._allocators.clear()
                self._profile = profile_index
                return True

        def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
            with self._alone() as engine:
                low, _, high = engine.get_tensor_profile_shape(name, self._profile)
                fits = all(want in (-1, size) for size, want in zip(shape, engine.shape(name), strict=True)) and all(
                    a < 0 or a <= size <= b for a, size, b in zip(low, shape, high, strict=True)
                )
                if fits:
                    self._shapes[name] = tuple(shape)
                return fits

        def infer_shapes(self) -> list[str]:
            with self._alone() as engine:
                inputs = engine.names(TensorIOMode.INPUT)
                lacking = [
                    name
                    for name in inputs
                    if name not in self._shapes or (engine.holds_shape(name) and name not in self._addresses)
                ]
                for name in inputs:
                    ranges = engine.get_tensor_profile_values(self._profile, name) if engine.holds_shape(name) else []
                    if ranges and name not in lacking:
                        low, _, high = ranges
                        values = self._host_value(engine, name).ravel().tolist()
                        if not all(a <= value <= b for a, value, b in zip(low, values, high, strict=True)):
                            raise RuntimeError("infer_shapes error code: -1")
                if not lacking:
                    for name in engine.names(TensorIOMode.OUTPUT):
                        try:
                            self._output_shape(engine, name)
                        except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:
                            raise RuntimeError("infer_shapes error code: -1") from error
                return lacking

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            with self._alone() as engine:
                return self._shapes.get(name) or self._output_shape(engine, name)

        def set_tensor_address(self, name: str, memory: int) -> bool:
            with self._alone():
                if not memory or (memory % ALIGNMENT and not self._is_on_host(self._engine_ref[0], name)):
                    raise misuse(f"address {memory} of {name} is null or not aligned to {ALIGNMENT} bytes")
                self._addresses[name] = memory
                return True

        def set_output_allocator(self, name: str, output_allocator: IOutputAllocator) -> bool:
            with self._alone():
                self._allocators[name] = output_allocator
                return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            with self._alone() as engine:
                trt.enqueues += 1
                if not stream_handle:
                    raise misuse("enqueued on the default stream, which synchronizes with all others")
                if self._scratch is None:
                    raise misuse("enqueued without device memory, which the caller has to manage")
                inputs = engine.names(TensorIOMode.INPUT)
                outputs = engine.names(TensorIOMode.OUTPUT)
                for name in inputs:
                    if name not in self._shapes:
                        raise misuse(f"enqueued before the shape of {name} was set")
                for name in [*inputs, *outputs]:
                    if name not in self._addresses and name not in self._allocators:
                        raise misuse(f"enqueued before the address of {name} was set")
                shapes = {name: self._shapes[name] for name in inputs}
                on_host = {name: self._host_value(engine, name) for name in inputs if self._is_on_host(engine, name)}
                places = {
                    name: (self._addresses[name], shapes[name], np.dtype(engine.dtype(name)))
                    for name in inputs
                    if name not in on_host
                }
                if self._allocators:
                    return self._run_now(engine, stream_handle, places, outputs)
                targets = {
                    name: (self._addresses[name], self._output_shape(engine, name), np.dtype(engine.dtype(name)))
                    for name in outputs
                }
                session = self._session

                def run() -> None:
                    feeds = {name: cudart.array_at(*place).copy() for name, place in places.items()} | on_host
                    for name, result in zip(outputs, session.run(outputs, feeds), strict=True):
                        cudart.array_at(*targets[name])[...] = result

                regions = [(place[0], _nbytes(place)) for place in targets.values()]
                reads = [(place[0], _nbytes(place)) for place in places.values()]
                cudart.enqueue_kernel(stream_handle, reads, [*regions, self._scratch], run)
                return True

        def _run_now(self, engine: ICudaEngine, stream: int, places: dict[str, Any], outputs: Sequence[str]) -> bool:
            """Outputs of unknown size: TensorRT waits for the sizes within the enqueue."""
            cudart.cudaStreamSynchronize(stream)
            feeds = {name: cudart.array_at(*place).copy() for name, place in places.items()}
            for name, result in zip(outputs, self._session.run(list(outputs), feeds), strict=True):
                address = self._addresses.get(name, 0)
                if name in self._allocators:
                    allocator: Any = self._allocators[name]
                    address = allocator.reallocate_output_async(name, 0, max(1, result.nbytes), ALIGNMENT, stream)
                    if not address:
                        return False
                    allocator.notify_shape(name, result.shape)
                if result.nbytes:
                    _enqueue_copy(cudart, stream, address, result)
            return True

        def _is_on_host(self, engine: ICudaEngine, name: str) -> bool:
            return engine.get_tensor_location(name) is TensorLocation.HOST

        def _host_value(self, engine: ICudaEngine, name: str) -> np.ndarray[Any, Any]:
            """Read the values of a shape, as TensorRT does: at once, on the host."""
            count = int(np.prod(self._shapes[name], dtype=np.int64))
            values = (ctypes.c_int64 * count).from_address(self._addresses[name])
            return np.array(values, np.int64).reshape(self._shapes[name])

        def _output_shape(self, engine: ICudaEngine, name: str) -> tuple[int, ...]:
            values = {n: self._host_value(engine, n) for n in self._shapes if self._is_on_host(engine, n)}
            if values:
                zeros = {n: np.zeros(self._shapes[n], engine.dtype(n)) for n in self._shapes if n not in values}
                return tuple(self._session.run([name], zeros | values)[0].shape)
            fixed = onnx.ModelProto()
            fixed.CopyFrom(engine._model)
            for value in fixed.graph.input:
                for dim, size in zip(value.type.tensor_type.shape.dim, self._shapes.get(value.name, ()), strict=False):
                    dim.dim_value = size
            for value in fixed.graph.output:
                for index, dim in enumerate(value.type.tensor_type.shape.dim):
                    if not dim.HasField("dim_value"):
                        dim.dim_param = f"free_{value.name}_{index}"
            inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
            known = {value.name: value for value in [*inferred.graph.output, *inferred.graph.value_info]}
            dims = known[name].type.tensor_type.shape.dim
            return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)

        def __del__(self) -> None:
            self._leave()
            if not self._user_managed and self._scratch is not None:
                cudart.cudaFree(self._scratch[0])
            if id(self) in trt.live_contexts:
                trt.live_contexts.remove(id(self))

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self._logger = logger
            self.engine_host_code_allowed = False

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
            if not bytes(serialized_engine).startswith(MAGIC):
                log: Any = self._logger
                log.log(ILogger.Severity.ERROR, "Serialization assertion failed. Magic tag does not match.")
                return None
            return ICudaEngine(bytes(serialized_engine))

    trt.Builder = type("Builder", (), {})
    for value in (
        *(ILogger, TensorIOMode, TensorLocation, DataType, ExecutionContextAllocationStrategy),
        *(ProfilingVerbosity, LayerInformationFormat, IOutputAllocator, ICudaEngine, IExecutionContext, Runtime),
        TensorFormat,
    ):
        setattr(trt, value.__name__, value)
    return trt  # type: ignore[no-any-return]


def _nbytes(place: tuple[int, Sequence[int], np.dtype[Any]]) -> int:
    return int(np.prod(place[1], dtype=np.int64)) * place[2].itemsize


def _enqueue_copy(cudart: FakeCudart, stream: int, address: int, result: np.ndarray[Any, Any]) -> None:
    def run() -> None:
        cudart.array_at(address, result.shape, result.dtype)[...] = result

    cudart.enqueue_kernel(stream, [], [(address, result.nbytes)], run)
