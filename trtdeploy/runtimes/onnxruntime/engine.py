"""A plan loaded into ONNX Runtime, and its execution contexts.

A session may be run from several threads at once, so all contexts share one: the weights are in memory once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trtdeploy.errors import InferenceError
from trtdeploy.runtimes.base import ExecutionContext, LoadedEngine
from trtdeploy.runtimes.onnxruntime.session import RUNTIME_ERRORS, Session, first_line
from trtdeploy.tensors import Array, TensorSpec


class OnnxRuntimeContext(ExecutionContext):
    """One inference at a time on the shared session."""

    def __init__(self, session: Session, outputs: Sequence[TensorSpec]) -> None:
        self._session = session
        self._names = [spec.name for spec in outputs]

    def execute(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            return dict(zip(self._names, self._session.run(self._names, inputs), strict=True))
        except RUNTIME_ERRORS as error:
            raise InferenceError(f"ONNX Runtime failed: {first_line(error)}") from error

    def execute_into(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        binding = self._session.io_binding()
        try:
            for name, array in inputs.items():
                binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            for name, array in outputs.items():
                binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            self._session.run_with_iobinding(binding)
        except RUNTIME_ERRORS as error:
            raise InferenceError(f"ONNX Runtime failed: {first_line(error)}") from error

    def close(self) -> None:
        self._session = None


class OnnxRuntimeEngine(LoadedEngine):
    """A loaded plan."""

    def __init__(self, session: Session, outputs: Sequence[TensorSpec], *, plan_bytes: int) -> None:
        self._session = session
        self._outputs = outputs
        self._plan_bytes = plan_bytes

    def create_context(self) -> OnnxRuntimeContext:
        return OnnxRuntimeContext(self._session, self._outputs)

    def memory(self) -> dict[str, int]:
        # The session keeps the graph's constants; its arena for activations cannot be asked for.
        return {"plan": self._plan_bytes}

    def close(self) -> None:
        self._session = None
