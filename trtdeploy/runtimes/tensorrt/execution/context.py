"""One execution context: its stream, its buffers, and one inference after another on them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trtdeploy.cuda.arrays import DeviceArray
from trtdeploy.cuda.device import Device
from trtdeploy.cuda.exported_array import ExportedArray
from trtdeploy.cuda.memory import DeviceBuffer, DevicePool, StagingRing, copy_on_device, copy_to_device, copy_to_host
from trtdeploy.cuda.streams import Stream
from trtdeploy.errors import DtypeError, InferenceError, ShapeError
from trtdeploy.runtimes.base import ExecutionContext
from trtdeploy.runtimes.tensorrt.bindings import Bindings
from trtdeploy.runtimes.tensorrt.execution.arena import Arena
from trtdeploy.runtimes.tensorrt.execution.graphs import GraphRunner
from trtdeploy.runtimes.tensorrt.execution.io_tensors import EngineProfile, EngineTensor, choose_profile
from trtdeploy.runtimes.tensorrt.execution.output_memory import GrowingOutput, make_output_allocator, shape_of
from trtdeploy.runtimes.tensorrt.execution.pending import TensorRTPending
from trtdeploy.runtimes.tensorrt.execution.result_memory import ResultMemory
from trtdeploy.tensors import Array

if TYPE_CHECKING:
    import tensorrt

_ALIGNMENT = 256
_SLOTS = 2
"""Staging slots: the host may fill the next one while the device reads the one before."""


class TensorRTContext(ExecutionContext):
    """An execution context with a stream of its own.

    Args:
        bindings: The library.
        context: TensorRT's own context; this object is its only user.
        tensors: The engine's inputs and outputs.
        profiles: What its profiles cover.
        device: The GPU.
        pool: Where device memory comes from.
        results: Where the memory of outputs that stay on the device comes from.
        arena: Scratch memory shared with other contexts; None if the context has its own.
        cuda_graphs: How many CUDA graphs to keep; 0 captures none.
        streams_weights: Whether weights are copied during inference.
    """

    def __init__(
        self,
        bindings: Bindings,
        context: tensorrt.IExecutionContext,
        *,
        tensors: Sequence[EngineTensor],
        profiles: Sequence[EngineProfile],
        device: Device,
        pool: DevicePool,
        results: ResultMemory,
        arena: Arena | None,
        cuda_graphs: int,
        streams_weights: bool,
    ) -> None:
        self._bindings = bindings
        self._context = context
        self._device = device
        self._pool = pool
        self._results = results
        self._arena = arena
        self._inputs = [tensor for tensor in tensors if tensor.is_input]
        self._outputs = [tensor for tensor in tensors if not tensor.is_input]
        self._profiles = profiles
        self._profile = 0
        self._stream = Stream(device)
        self._staged_inputs = StagingRing(device, slots=_SLOTS)
        self._staged_outputs = StagingRing(device, slots=_SLOTS)
        self._buffers: dict[str, DeviceBuffer] = {}
        self._host_values: dict[str, Array] = {}
        self._growing: dict[str, tuple[tensorrt.IOutputAllocator, GrowingOutput]] = {}
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._output_shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._graphs = GraphRunner(device, cuda_graphs)
        if streams_weights:
            self._graphs.forbid("weights are streamed during inference")
        if any(tensor.on_host for tensor in tensors):
            self._graphs.forbid("the model has shape tensors, whose values are read at every enqueue")
        if arena is not None:
            context.set_device_memory(arena.address, arena.nbytes)

    @property
    def graphs(self) -> Mapping[str, int | str]:
        """Counts of captured, replayed and evicted CUDA graphs, and why inferences ran without one."""
        return self._graphs.report()

    @property
    def waits(self) -> bool:
        """Whether an enqueue waits for the device: TensorRT has to know a size that depends on the data."""
        return bool(self._growing)

    def execute(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self.start(inputs).wait()

    def execute_into(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        results = self.start(inputs).wait()
        for name, array in results.items():
            if outputs[name].shape != array.shape:
                raise InferenceError(
                    f"Output {name} has shape {list(array.shape)}; the array given has {list(outputs[name].shape)}."
                )
        for name, array in results.items():
            outputs[name][...] = array

    def start(self, inputs: Mapping[str, Array]) -> TensorRTPending:
        with self._device.use():
            self._compute(inputs)
            return self._copy_out(inputs)

    def starts_quickly(self, inputs: Mapping[str, Array]) -> bool:
        return (
            self._shapes == self._shapes_of(inputs)
            and not self._new_values(inputs)
            and not self._graphs.captures_next(self._key())
        )

    def execute_on_device(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        with self._device.use():
            self._compute(inputs)
            results: dict[str, Any] = {}
            try:
                for tensor in self._outputs:
                    if not tensor.on_host:
                        results[tensor.name] = self._export(tensor)
            finally:
                # also after an error: memory that is let go of must not be written any more
                self._stream.synchronize()
        return results | {
            tensor.name: self._host_values[tensor.name].copy() for tensor in self._outputs if tensor.on_host
        }

    def _export(self, tensor: EngineTensor) -> ExportedArray:
        """Give an output memory of its own.

        A copy within the device costs little; an output written in place would need a new address in every inference,
        and no CUDA graph could be replayed.
        """
        shape, address = self._placed(tensor)
        nbytes = int(np.prod(shape, dtype=np.int64)) * tensor.dtype.itemsize
        memory = self._results.give(nbytes, self._stream)
        copy_on_device(self._device, memory.address, address, nbytes, self._stream)
        return ExportedArray(memory.address, shape, tensor.dtype, memory, device=self._device)

    def memory(self) -> dict[str, int]:
        """Return the bytes that this context holds, by owner."""
        # copies: another thread may be in the middle of an inference
        buffers = [*self._buffers.values(), *(output.buffer for _, output in list(self._growing.values()))]
        return {
            "inputs and outputs on the device": sum(buffer.nbytes for buffer in buffers if buffer is not None),
            "pinned staging": self._staged_inputs.nbytes + self._staged_outputs.nbytes,
        }

    def close(self) -> None:
        with self._device.use():
            self._release()

    def _release(self) -> None:
        self._stream.synchronize()
        self._graphs.close()
        del self._context
        for buffer in self._buffers.values():
            buffer.free(self._stream)
        for _, output in self._growing.values():
            if output.buffer is not None:
                output.buffer.free(self._stream)
        self._buffers.clear()
        self._growing.clear()
        self._stream.synchronize()
        self._staged_inputs.close()
        self._staged_outputs.close()
        self._stream.close()

    def _compute(self, inputs: Mapping[str, Array]) -> None:
        """Enqueue all up to the results, which then lie in this context's own memory."""
        with self._bindings.messages.capture() as capture:
            self._set_shapes(inputs)
            self._copy_in(inputs)
            self._place_outputs()
            if not self._enqueue():
                for _, output in self._growing.values():
                    if output.failure is not None:
                        raise output.failure
                raise InferenceError(
                    "TensorRT failed to enqueue the inference.",
                    hint="Its log is below; trtdeploy doctor looks at driver and GPU.",
                    log_lines=capture.lines,
                )

    def _placed(self, tensor: EngineTensor) -> tuple[tuple[int, ...], int]:
        """Return shape and address of an output on the device."""
        if tensor.name in self._growing:
            output = self._growing[tensor.name][1]
            return shape_of(tensor.name, output), output.buffer.address if output.buffer is not None else 0
        return self._output_shapes[tensor.name], self._buffers[tensor.name].address

    def _shapes_of(self, inputs: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
        return {tensor.name: inputs[tensor.name].shape for tensor in self._inputs}

    def _set_shapes(self, inputs: Mapping[str, Array]) -> None:
        """Tell TensorRT shapes, and the values of shape tensors, if they differ from the last; the profile first."""
        shapes = self._shapes_of(inputs)
        values = self._new_values(inputs)
        if shapes == self._shapes and not values:
            return
        self._shapes = None  # unknown until all of them are set
        if values:
            self._stream.synchronize()  # an earlier enqueue may still read the old ones
            self._host_values |= {name: array.copy() for name, array in values.items()}
        self._switch_profile(choose_profile(self._profiles, inputs, self._profile))
        for tensor in self._inputs:
            if tensor.on_host:
                self._set_address(tensor.name, self._host_values[tensor.name].ctypes.data)
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise ShapeError(f"TensorRT refuses shape {list(shape)} of input {name!r} in profile {self._profile}.")
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise ShapeError(f"No output shapes follow from {shapes}: {error}.") from error
        if missing:
            raise ShapeError(f"TensorRT lacks the shape or value of {', '.join(missing)}.")
        self._output_shapes = {
            tensor.name: tuple(int(size) for size in self._context.get_tensor_shape(tensor.name))
            for tensor in self._outputs
        }
        self._shapes = shapes

    def _switch_profile(self, wanted: int) -> None:
        if wanted == self._profile:
            return
        # nothing says that TensorRT keeps them for another profile
        self._addresses.clear()
        try:
            # the binding raises where the library returns false (TensorRT, pyCore.cpp)
            self._context.set_optimization_profile_async(wanted, self._stream.handle)
        except RuntimeError as error:
            raise InferenceError(f"TensorRT cannot switch to profile {wanted}: {error}.") from error
        self._profile = wanted
        for name, (allocator, _) in self._growing.items():
            self._context.set_output_allocator(name, allocator)
        # the next enqueue has to be one of TensorRT's own: it brings the new profile's resources
        self._graphs.forget()

    def _new_values(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the values of shape tensors that differ from those that TensorRT reads now; all are checked first."""
        given = {tensor.name: inputs[tensor.name] for tensor in self._inputs if tensor.on_host}
        for name, array in given.items():
            if _on_device(array):
                raise DtypeError(
                    f"Input {name!r} holds the values of a shape, which TensorRT reads on the host; an array on the "
                    "GPU was given.",
                    hint="Copy it to the host first.",
                )
        kept = self._host_values
        return {
            name: array for name, array in given.items() if name not in kept or not np.array_equal(kept[name], array)
        }

    def _copy_in(self, inputs: Mapping[str, Array]) -> None:
        staged = {t.name: inputs[t.name] for t in self._inputs if not t.on_host and not _on_device(inputs[t.name])}
        offsets, total = _layout(staged)
        if staged:
            with self._staged_inputs.slot(total, self._stream) as slot:
                for name, array in staged.items():
                    slot.view(array.dtype, array.shape, offset=offsets[name])[...] = array
                    buffer = self._buffer(name, array.nbytes)
                    copy_to_device(
                        self._device, buffer.address, slot.address + offsets[name], array.nbytes, self._stream
                    )
                    self._set_address(name, buffer.address)
        for tensor in self._inputs:
            given: Any = inputs[tensor.name]
            if isinstance(given, DeviceArray):
                self._use_device_array(tensor, given)

    def _use_device_array(self, tensor: EngineTensor, array: DeviceArray) -> None:
        """Read an input where it lies; TensorRT demands an alignment that a slice of a tensor may not have."""
        if array.producer is not None:
            self._stream.wait_for_stream(array.producer)
        if array.address % _ALIGNMENT == 0 and not self._graphs.enabled:
            self._set_address(tensor.name, array.address)
            return
        # A captured graph holds addresses, and those of a caller change with every call: one copy on the device
        # keeps them fixed and costs less than a capture.
        buffer = self._buffer(tensor.name, array.nbytes)
        copy_on_device(self._device, buffer.address, array.address, array.nbytes, self._stream)
        self._set_address(tensor.name, buffer.address)

    def _place_outputs(self) -> None:
        for tensor in self._outputs:
            shape = self._output_shapes[tensor.name]
            if tensor.on_host:
                self._place_host_output(tensor, shape)
            elif any(size < 0 for size in shape):
                if tensor.name not in self._growing:
                    self._growing[tensor.name] = make_output_allocator(self._bindings, self._pool, self._stream)
                    self._context.set_output_allocator(tensor.name, self._growing[tensor.name][0])
                    self._graphs.forbid(f"the size of output {tensor.name} depends on the data")
                self._growing[tensor.name][1].failure = None
            else:
                nbytes = max(1, int(np.prod(shape, dtype=np.int64)) * tensor.dtype.itemsize)
                self._set_address(tensor.name, self._buffer(tensor.name, nbytes).address)

    def _place_host_output(self, tensor: EngineTensor, shape: tuple[int, ...]) -> None:
        kept = self._host_values.get(tensor.name)
        if kept is None or kept.shape != shape:
            self._stream.synchronize()
            self._host_values[tensor.name] = kept = np.zeros(shape, tensor.dtype)
        self._set_address(tensor.name, kept.ctypes.data)

    def _key(self) -> Hashable:
        """Return what a CUDA graph holds of an enqueue."""
        return self._profile, tuple((self._shapes or {}).items()), tuple(self._addresses.items())

    def _enqueue(self) -> bool:
        key = self._key()

        def enqueue() -> bool:
            return bool(self._context.execute_async_v3(self._stream.handle))

        if self._arena is None:
            return self._graphs.run(key, self._stream, enqueue)
        with self._arena.in_use(self._stream):
            return self._graphs.run(key, self._stream, enqueue)

    def _copy_out(self, inputs: Mapping[str, Array]) -> TensorRTPending:
        shapes = dict(self._output_shapes)
        sources: dict[str, int] = {}
        for tensor in self._outputs:
            if not tensor.on_host:
                shapes[tensor.name], sources[tensor.name] = self._placed(tensor)
        results = {t.name: np.empty(shapes[t.name], t.dtype) for t in self._outputs}
        offsets, total = _layout({name: array for name, array in results.items() if name in sources})
        slot = self._staged_outputs.take(total)
        try:
            for name, address in sources.items():
                copy_to_host(self._device, slot.address + offsets[name], address, results[name].nbytes, self._stream)
            slot.done_after(self._stream)
        except BaseException:
            try:
                self._stream.synchronize()
            finally:
                slot.release()
            raise
        host_outputs = {t.name: self._host_values[t.name] for t in self._outputs if t.on_host}
        return TensorRTPending(slot, results, offsets, host_outputs, inputs)

    def _buffer(self, name: str, nbytes: int) -> DeviceBuffer:
        """Return the tensor's buffer, which only ever grows; stream order makes freeing the old one safe."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            grown = self._pool.allocate(max(nbytes, 1), self._stream)
            if buffer is not None:
                self._graphs.forget()  # they hold the old address
                buffer.free(self._stream)
            self._buffers[name] = buffer = grown
        return buffer

    def _set_address(self, name: str, address: int) -> None:
        if self._addresses.get(name) != address:
            if not self._context.set_tensor_address(name, address):
                raise InferenceError(f"TensorRT refuses the address of tensor {name}.")
            self._addresses[name] = address


def _on_device(array: Any) -> bool:
    return isinstance(array, DeviceArray)


def _layout(arrays: Mapping[str, Array]) -> tuple[dict[str, int], int]:
    """Return where each array begins in one staging slot, aligned, and how long the slot must be."""
    offsets: dict[str, int] = {}
    total = 0
    for name, array in arrays.items():
        offsets[name] = total
        total += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, total
