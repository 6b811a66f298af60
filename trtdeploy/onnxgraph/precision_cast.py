"""Casting what is not quantized to FP16 or BF16: a strongly typed network takes every type from the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trtdeploy.errors import ModelError, RuntimeUnavailableError
from trtdeploy.onnxgraph.graph import (
    Graph,
    opset_version,
    outer_names,
    quantized_constant,
    remove_unused,
    with_named_nodes,
)

logger = logging.getLogger(__name__)

HighPrecision = Literal["fp16", "bf16"]

_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
# The first opsets whose QuantizeLinear takes scales of that type, and whose other ops know it.
_LOWEST_OPSET = {"fp16": 19, "bf16": 22}
_TOLERATED_SCALE_ERROR = 0.01


def cast_unquantized(model: onnx.ModelProto, precision: HighPrecision) -> onnx.ModelProto:
    """Return the model with everything that is not INT8 in FP16 or BF16; its inputs and outputs stay float32.

    The output of a DequantizeLinear has the type of its scale, so the scales are cast too. The INT8 codes of the
    weights are computed before that and stored: from rounded weights and scales they would be others.

    FP16 is the pass of ``onnxruntime.transformers.float16``, BF16 that of NVIDIA's ModelOpt, which alone has one. A
    model with Q/DQ is converted to opset 19 (FP16) or 22 (BF16), the first with such scales.

    Args:
        model: A float32 model, with or without Q/DQ, without custom ops.
        precision: The type of what is not quantized.

    Raises:
        ModelError: The model cannot be converted, to that opset or to that type.
        RuntimeUnavailableError: The library is not installed.
    """
    cast: Callable[[onnx.ModelProto], onnx.ModelProto] = {"fp16": _to_fp16, "bf16": _to_bf16}[precision]
    has_qdq = any(node.op_type in _QDQ for node in model.graph.node)
    # both passes go by the names of nodes, and rename outputs of the graph, after which unnamed nodes are called
    prepared = _with_stored_codes(with_named_nodes(model))
    if precision == "fp16":
        _warn_of_small_scales(prepared)
    if precision == "bf16" or has_qdq:
        prepared = with_named_nodes(_at_opset(prepared, _LOWEST_OPSET[precision]))
    try:
        result = cast(prepared)
    except RuntimeUnavailableError:
        raise
    except Exception as error:  # neither library has an error class of its own
        raise ModelError(f"The model cannot be cast to {precision}: {error}") from error
    _sort_nodes(result.graph)
    remove_unused(result.graph)  # ModelOpt leaves the types of casts that it has removed
    result.ir_version = max(result.ir_version, helper.find_min_ir_version_for(list(result.opset_import)))
    del result.metadata_props[:]
    result.metadata_props.extend(model.metadata_props)
    _require_consistent_types(result, precision)
    return result


def _to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        from onnxruntime.transformers.float16 import convert_float_to_float16
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"Casting to FP16 needs ONNX Runtime's float16 pass: {error}.", hint="Install it: pip install onnxruntime"
        ) from error
    result: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True)
    return result


def _to_bf16(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        autocast: Any = import_module("modelopt.onnx.autocast")
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"Casting to BF16 needs NVIDIA's ModelOpt: {error}.",
            hint="Install it: pip install 'nvidia-modelopt[onnx]'; or use --high-precision fp16, which needs nothing.",
        ) from error
    result: onnx.ModelProto = autocast.convert_to_f16(model, low_precision_type="bf16", keep_io_types=True)
    return result


def _with_stored_codes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace every QuantizeLinear of a constant by its codes."""
    stored = _copy(model)
    graph = Graph(stored.graph)
    kept: list[onnx.NodeProto] = []
    for node in stored.graph.node:
        codes = quantized_constant(graph, node) if node.op_type == "QuantizeLinear" else None
        if codes is None:
            kept.append(node)
        else:
            stored.graph.initializer.append(numpy_helper.from_array(codes, node.output[0]))
    del stored.graph.node[:]
    stored.graph.node.extend(kept)
    remove_unused(stored.graph)
    return stored


def _warn_of_small_scales(model: onnx.ModelProto) -> None:
    """FP16 has ever fewer bits below 6e-5; a scale there may move by more than its codes can make up for."""
    graph = Graph(model.graph)
    scales = [graph.constant(node.input[1]) for node in model.graph.node if node.op_type == "DequantizeLinear"]
    moved = 0
    for scale in scales:
        if scale is not None and (scale > 0).all():
            error = np.abs(scale.astype(np.float16).astype(np.float64) / scale - 1)
            moved += int((error > _TOLERATED_SCALE_ERROR).sum())
    if moved:
        logger.warning("%d scales are too small for FP16 and move by more than 1%%; BF16 would keep them", moved)


def _at_opset(model: onnx.ModelProto, lowest: int) -> onnx.ModelProto:
    version = opset_version(model)
    if version >= lowest:
        return model
    # The converter knows ONNX's own ops only; unused imports of other domains make it fail.
    used = {node.domain for node in model.graph.node}
    imports: list[Any] = [entry for entry in model.opset_import if entry.domain in used or entry.domain == ""]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    try:
        return onnx.version_converter.convert_version(model, lowest)
    except Exception as error:  # its own errors have no common class
        raise ModelError(
            f"The model has opset {version} and cannot be converted to {lowest}, which scales of that type need: "
            f"{error}",
            hint=f"Export it with opset {lowest} or later.",
        ) from error


def _require_consistent_types(model: onnx.ModelProto, precision: HighPrecision) -> None:
    try:
        typed = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise ModelError(f"Cast to {precision}, the model's types contradict each other: {error}") from error
    wanted = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    types = {value.type.tensor_type.elem_type for value in typed.graph.value_info}
    if wanted not in types:
        raise ModelError(f"The pass that casts to {precision} left the model as it was; it found nothing to cast.")


def _sort_nodes(graph: onnx.GraphProto) -> None:
    """Put nodes behind those that they read, which the FP16 pass leaves undone; else keep their order."""
    waiting = list(graph.node)
    made = {value.name for value in [*graph.input, *graph.initializer]} | {""}
    made_here = {output for node in waiting for output in node.output}
    ordered: list[onnx.NodeProto] = []
    while waiting:
        later: list[onnx.NodeProto] = []
        for node in waiting:
            if all(name in made or name not in made_here for name in [*node.input, *outer_names(node)]):
                ordered.append(node)
                made.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise ModelError(f"The graph has a cycle at node {later[0].name!r}.")
        waiting = later
    del graph.node[:]
    graph.node.extend(ordered)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
