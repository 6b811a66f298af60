"""Classifiers of the kinds that the ledger compares: an ONNX file as it is, and a built plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trtdeploy.engine import Engine
from trtdeploy.errors import ModelError
from trtdeploy.onnxgraph.reading.source import load_source
from trtdeploy.runtimes.onnxruntime.witness import Witness
from trtdeploy.tensors import Array, TensorSpec


def onnx_classifier(path: str | Path) -> Callable[[Array], Array]:
    """Return a function from a batch of model input to class scores, exactly as the file is written.

    Raises:
        ModelError: It is no ONNX model, does not run here, or has more than one input or output.
    """
    source = load_source(path)
    input_name, output_name = _one_of_each(str(path), source.inputs, source.outputs)
    run = Witness(source.proto, [output_name], name=str(path))
    return lambda batch: run({input_name: batch})[0]


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
