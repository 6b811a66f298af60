"""Casting what is not quantized to FP16 or BF16: strongly typed networks take their types from the model.

Q/DQ are cast too: TensorRT demands scales of the type that they scale, and a DequantizeLinear gives the type of its
scale, so FP32 scales would leave FP32 layers between the INT8 ones.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from trtdeploy.errors import ModelError, RuntimeUnavailableError
from trtdeploy.onnxgraph.qdq import Graph, node_name

logger = logging.getLogger(__name__)

_QDQ = ("QuantizeLinear", "DequantizeLinear")
_OPSET_WITH_FP16_QDQ = 19
"""The first whose QuantizeLinear takes FP16 and BF16: https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html."""
_TOLERATED_SCALE_ERROR = 0.01


def cast_unquantized(model: onnx.ModelProto, kind: Literal["fp16", "bf16"]) -> onnx.ModelProto:
    """Return the model with float layers, and the scales of Q/DQ, in another type; inputs and outputs stay float32.

    FP16 is done by ONNX Runtime's pass, BF16 by Model Optimizer's AutoCast, which has to be installed.

    Raises:
        ModelError: The pass fails on this model.
        RuntimeUnavailableError: The library that does it is not installed.
    """
    newer = _with_opset(model)
    return _to_fp16(newer) if kind == "fp16" else _to_bf16(newer)


def _with_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert a quantized model to an opset whose Q/DQ take other types than float32."""
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset >= _OPSET_WITH_FP16_QDQ or not any(node.op_type in _QDQ for node in model.graph.node):
        return model
    try:
        return onnx.version_converter.convert_version(model, _OPSET_WITH_FP16_QDQ)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"The model has opset {opset} and cannot be converted to {_OPSET_WITH_FP16_QDQ}, whose Q/DQ take FP16: "
            f"{error}",
            hint=f"Export it with opset {_OPSET_WITH_FP16_QDQ}.",
        ) from error


def _to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    pass_module = importlib.import_module("onnxruntime.transformers.float16")
    blocked = [name for name in pass_module.DEFAULT_OP_BLOCK_LIST if name not in _QDQ]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    try:
        converted: onnx.ModelProto = pass_module.convert_float_to_float16(
            copy, keep_io_types=True, op_block_list=blocked, force_fp16_initializers=True
        )
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"ONNX Runtime's FP16 pass fails on this model: {error}") from error
    _warn_of_coarse_scales(model, converted)
    return converted


def _warn_of_coarse_scales(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """FP16 has few bits left below 6e-5: a scale there may move by more than the codes can make up for."""
    old, new = Graph(before.graph), Graph(after.graph)
    coarse = []
    for node in before.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        scale, cast = old.constant(node.input[1]), new.constant(node.input[1])
        if scale is None or cast is None or scale.shape != cast.shape:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.abs(cast.astype(np.float64) / scale.astype(np.float64) - 1).max(initial=0)
        if error > _TOLERATED_SCALE_ERROR:
            coarse.append(node_name(node))
    if coarse:
        logger.warning("%d scales are too small for FP16 and moved by more than 1%%: %s", len(coarse), coarse[:5])


def _to_bf16(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        autocast: Any = importlib.import_module("modelopt.onnx.autocast")
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"BF16 is cast by Model Optimizer's AutoCast, which is not installed: {error}.",
            hint="Install it: pip install 'nvidia-modelopt[onnx]'; or use --high-precision fp16.",
        ) from error
    with tempfile.TemporaryDirectory(prefix="trtdeploy-cast-") as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        try:
            converted: onnx.ModelProto = autocast.convert_to_mixed_precision(
                str(path), low_precision_type="bf16", keep_io_types=True
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise ModelError(f"Model Optimizer's BF16 pass fails on this model: {error}") from error
    return converted
