"""An ONNX model in ONNX Runtime as it is, without a plan: to calibrate it, or to compare a plan with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trtdeploy.errors import InferenceError, ModelError
from trtdeploy.runtimes.onnxruntime.cpu import usable_cores
from trtdeploy.runtimes.onnxruntime.session import OPTIMIZE_ALL, RUNTIME_ERRORS, first_line, make_session
from trtdeploy.tensors import Array

Run = Callable[[Mapping[str, Array]], list[Array]]


def direct_runner(
    model: bytes, outputs: Sequence[str], *, name: str = "the model", optimization: Any = OPTIMIZE_ALL
) -> Run:
    """Return a function from a model's inputs to some of its outputs, on all usable cores.

    Args:
        model: Serialized ONNX.
        outputs: Names of the outputs to return, in this order.
        name: What messages call the model.
        optimization: One of the ``OPTIMIZE_`` levels of ``session``.

    Raises:
        ModelError: ONNX Runtime does not accept the model. The function raises ``InferenceError`` where the runtime
            fails on its inputs.
    """
    try:
        session = make_session(model, threads=usable_cores(), optimization=optimization)
    except RUNTIME_ERRORS as error:
        raise ModelError(f"ONNX Runtime does not accept {name}: {first_line(error)}") from error

    def run(inputs: Mapping[str, Array]) -> list[Array]:
        try:
            answers: list[Array] = session.run(list(outputs), dict(inputs))
        except RUNTIME_ERRORS as error:
            raise InferenceError(f"ONNX Runtime failed on {name}: {first_line(error)}") from error
        return answers

    return run
