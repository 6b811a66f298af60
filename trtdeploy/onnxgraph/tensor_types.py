"""Element types of a graph's tensors, as far as ONNX's inference knows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import onnx
from onnx import helper

_SMALL_BYTES = 4096
"""What is larger is a weight, whose values no type depends on."""


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which large initializers are inputs, so that a large model is not copied."""
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.value_info.extend(model.graph.value_info)
    light.graph.output.extend(model.graph.output)
    inputs = {value.name: value for value in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.ByteSize() <= _SMALL_BYTES:
            light.graph.initializer.append(tensor)
        else:
            inputs[tensor.name] = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
    light.graph.input.extend(inputs.values())
    return light


def tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type (``TensorProto.DataType``) of inputs, constants and what nodes make of them.

    Those of subgraphs are among them. What custom ops make is missing; of a model that the inference refuses, all that
    nodes make.
    """
    light = without_weights(model)
    known = {tensor.name: tensor.data_type for tensor in light.graph.initializer}
    with suppress(onnx.shape_inference.InferenceError):  # what the model says itself is known all the same
        light = onnx.shape_inference.infer_shapes(light)
    for graph in graphs_inside(light.graph):
        known.update({tensor.name: tensor.data_type for tensor in graph.initializer})
        values = [*graph.input, *graph.value_info, *graph.output]
        known.update({value.name: value.type.tensor_type.elem_type for value in values})
    return {name: kind for name, kind in known.items() if kind}


def graphs_inside(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and every subgraph of its nodes, at any depth."""
    yield graph
    for node in graph.node:
        for entry in node.attribute:
            for inner in [entry.g] if entry.HasField("g") else list(entry.graphs):
                yield from graphs_inside(inner)
