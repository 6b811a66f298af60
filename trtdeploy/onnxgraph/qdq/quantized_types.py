"""The type that Q/DQ asks of a layer: int8, fp8, int4 weight-only and so on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import NodeProto, TensorProto

if TYPE_CHECKING:
    from trtdeploy.onnxgraph.graph import Graph

INT8 = "int8"
WEIGHT_ONLY = " weight-only"
"""Ends the type of a layer whose weights alone are quantized: its arithmetic is that of its input, float."""

# float8e4m3fn is what TensorRT and its documentation call FP8, float4e2m1 what they call FP4; by their ONNX name: an
# older onnx does not have them all
_SHORT = {"FLOAT8E4M3FN": "fp8", "FLOAT4E2M1": "fp4"}
_BYTES = {INT8, "uint8"}
_FLOAT = {"float", "float16", "float32", "float64", "bfloat16", "tf32"}


def asked_type(graph: Graph, of_input: NodeProto | None, of_weights: NodeProto | None) -> str | None:
    """Return the type that a layer is asked to compute in, or None for float.

    ``int8`` stands for signed and unsigned codes alike. Two different types are both named: ``int4 weights, int8
    input``.

    Args:
        graph: The graph of the layer.
        of_input: The DequantizeLinear that makes its input, if one does.
        of_weights: The DequantizeLinear that makes its weights, if one does.
    """
    if of_weights is None:
        return None
    weights = code_type(graph, of_weights)
    if of_input is None:
        return weights + WEIGHT_ONLY
    codes = code_type(graph, of_input)
    if {weights, codes} <= _BYTES:
        return INT8
    return weights if codes == weights else f"{weights} weights, {codes} input"


def quantizes_input(kind: str | None) -> bool:
    """Say whether a layer of this type computes on quantized values: its input is quantized, not its weights alone."""
    return kind is not None and kind not in _FLOAT and not kind.endswith(WEIGHT_ONLY)


def code_type(graph: Graph, dequantize: NodeProto) -> str:
    """Return the type of the codes that a DequantizeLinear reads: ``int8``, ``uint8``, ``int16``, ``int4``, ``fp8`` ...

    The zero-point has the type of the codes; without one they tell it themselves
    (https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html).
    """
    element = graph.element_type(dequantize.input[2]) if len(dequantize.input) > 2 else None
    name = dequantize.input[0]
    while element is None and name:
        element = graph.element_type(name)
        maker = graph.producer.get(name)
        if element is None and maker is not None and maker.op_type == "QuantizeLinear":
            element = _quantizes_to(graph, maker)
        # what moves codes, such as Reshape or MaxPool, keeps their type
        name = maker.input[0] if maker is not None and maker.input else ""
    if not element:
        return "unknown type"
    known = str(TensorProto.DataType.Name(element))
    return _SHORT.get(known, known.lower())


def _quantizes_to(graph: Graph, quantize: NodeProto) -> int:
    if len(quantize.input) > 2 and quantize.input[2]:
        element = graph.element_type(quantize.input[2])
        if element is not None:
            return element
    stated = next((entry.i for entry in quantize.attribute if entry.name == "output_dtype"), 0)
    # without a zero-point and output_dtype: uint8 (https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html)
    return int(stated) or TensorProto.UINT8
