"""Classifiers of the kinds that the ledger compares: an ONNX file as it is, and a built plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trtdeploy.engine import Engine
from trtdeploy.errors import InferenceError, ModelError
from trtdeploy.onnxgraph.source import load_source
from trtdeploy.runtimes.onnxruntime.cpu import usable_cores
from trtdeploy.runtimes.onnxruntime.session import OPTIMIZE_ALL, RUNTIME_ERRORS, first_line, make_session
from trtdeploy.tensors import Array, TensorSpec


def onnx_classifier(path: str | Path) -> Callable[[Array], Array]:
    """Return a function from a batch of model input to class scores, by ONNX Runtime with its default optimization.

    Raises:
        ModelError: It is no ONNX model, does not run here, or has more than one input or output.
    """
    source = load_source(path)
    input_name, output_name = _one_of_each(str(path), source.inputs, source.outputs)
    try:
        session = make_session(source.proto.SerializeToString(), threads=usable_cores(), optimization=OPTIMIZE_ALL)
    except RUNTIME_ERRORS as error:
        raise ModelError(f"ONNX Runtime cannot run {path}: {first_line(error)}") from error

    def predict(batch: Array) -> Array:
        try:
            scores: Array = session.run([output_name], {input_name: batch})[0]
        except RUNTIME_ERRORS as error:
            raise InferenceError(f"ONNX Runtime failed on {path}: {first_line(error)}") from error
        return scores

    return predict


def plan_classifier(engine: Engine) -> Callable[[Array], Array]:
    """Return a function from a batch of model input to class scores, by a loaded plan.

    Raises:
        ModelError: The plan has more than one input or output.
    """
    input_name, output_name = _one_of_each("The plan", engine.inputs, engine.outputs)
    return lambda batch: engine.infer({input_name: batch})[output_name]


def _one_of_each(name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> tuple[str, str]:
    if len(inputs) != 1 or len(outputs) != 1:
        raise ModelError(f"{name} has {len(inputs)} inputs and {len(outputs)} outputs; a classifier has one of each.")
    return inputs[0].name, outputs[0].name
