"""Dynamic ranges to explicit Q/DQ and back.

TensorRT 11 and TensorRT-RTX take no dynamic ranges: the same scales then stand in the model as Q/DQ. Whether they come
from a file of ranges or from a model that has Q/DQ already, equal scales make the same model: for every explicit model
``e`` whose Q/DQ is where ``placement`` wants it,

    canonical_qdq(e) == quantize_with_ranges(without_qdq(e), ranges_of(e))

node for node and bit for bit. ``ranges_of`` also has the scales of weights that are not amax / 127, as QAT leaves them;
JSON keeps them, a calibration cache cannot. What no file of ranges says, and ``canonical_qdq`` keeps, is Q/DQ in other
places, and its absence where a range is known.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from trtdeploy.errors import ModelError, QuantizationError
from trtdeploy.onnxgraph.graph import WEIGHTED_OPS, Graph, node_name, opset_version
from trtdeploy.onnxgraph.qdq.dynamic_ranges import DynamicRanges
from trtdeploy.onnxgraph.qdq.int8_scales import channel_axis, chosen_weight_scale, with_room
from trtdeploy.onnxgraph.qdq.pairs import Quantizer, Site, pairs, put_in, take_out
from trtdeploy.onnxgraph.qdq.placement import Wanted, float32_sites, wanted_sites
from trtdeploy.tensors import Array

logger = logging.getLogger(__name__)

LOWEST_OPSET = 13
"""The first whose QuantizeLinear has an axis, which per-channel weights need."""


@dataclass(frozen=True)
class RangesApplied:
    """A model with Q/DQ from dynamic ranges, and what became of its layers.

    Attributes:
        model: The model.
        quantized: Names of the weighted layers that have Q/DQ now.
        left_float: Why a weighted layer has none, by name.
        unknown: Names in the ranges that are no tensor of the model.
        one_scale: Names of the ConvTranspose among them whose weight has one scale; see ``chosen_weight_scale``.
        widened: Tensors around a Concat whose range was smaller than that of another one there: they share the largest.
    """

    model: onnx.ModelProto
    quantized: tuple[str, ...]
    left_float: dict[str, str]
    unknown: tuple[str, ...]
    one_scale: tuple[str, ...]
    widened: tuple[str, ...]


def quantize_with_ranges(model: onnx.ModelProto, ranges: DynamicRanges) -> onnx.ModelProto:
    """Return the model with Q/DQ from dynamic ranges; see ``apply_ranges``. What stays float is logged."""
    applied = apply_ranges(model, ranges)
    if applied.unknown:
        logger.warning(
            "%d of %d tensors in the ranges are not in the model, for example %s",
            len(applied.unknown),
            len(ranges.scales) + len(ranges.weight_scales),
            ", ".join(applied.unknown[:3]),
        )
    for name, reason in applied.left_float.items():
        logger.warning("%s stays in float: %s", name, reason)
    if applied.one_scale:
        logger.warning(
            "The weight of every ConvTranspose (%s) has one scale; ranges may give one per output channel",
            _some(applied.one_scale),
        )
    if applied.widened:
        logger.warning(
            "What a Concat joins shares one scale, so the ranges of %d tensors are wider now, for example %s",
            len(applied.widened),
            ", ".join(applied.widened[:3]),
        )
    return applied.model


def apply_ranges(model: onnx.ModelProto, ranges: DynamicRanges) -> RangesApplied:
    """Put Q/DQ where TensorRT wants it and a range is known.

    That is input and weights of every Conv, ConvTranspose, Gemm and MatMul, and residual additions, gates, pooling and
    concatenations as ``wanted_sites`` names them. Only there: a calibration cache has a range for every tensor, and
    Q/DQ elsewhere breaks TensorRT's fusions ("by default do not quantize their outputs", TensorRT's recommendations for
    Q/DQ placement). Activations are quantized per tensor with the given scales, weights with the given ones or
    as ``chosen_weight_scale`` says, with room for their bias, all symmetric INT8. What a Concat joins has one scale,
    the largest of those given.

    Args:
        model: A float model of opset 13 or later; its weights are initializers or Constant nodes.
        ranges: Scales by name of the ONNX tensor. Ranges of tensors that want no Q/DQ are not used.

    Raises:
        QuantizationError: The model has Q/DQ already or too old an opset; no layer or no name of the ranges matches;
            what a layer needs has a scale of 0 or infinity; given scales of a weight are not one per output channel.
        ModelError: A weight is not finite.
    """
    require_float_model(model)
    graph = Graph(model.graph)
    known = {name for node in model.graph.node for name in [*node.input, *node.output]}
    unknown = tuple(name for name in [*ranges.scales, *ranges.weight_scales] if name not in known)
    if not known.intersection(ranges.scales):
        raise QuantizationError(
            f"None of the {len(ranges.scales)} tensors in the ranges is in the model; they name {_some(unknown)}, the "
            f"model has {_some(_activations(model))}.",
            hint="Ranges belong to the model that they were found on: export and calibrate the same one.",
        )
    others = [wanted for wanted in float32_sites(model, wanted_sites(model)) if wanted.reason != "weight"]
    _refuse_unusable(others, ranges)
    scales = _sharing(others, ranges.scales)
    sites = {
        wanted.site: Quantizer(wanted.tensor, np.asarray(scales[wanted.tensor]))
        for wanted in others
        if wanted.reason != "input" and wanted.tensor in scales
    }
    quantized: list[str] = []
    left_float: dict[str, str] = {}
    transposed: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in WEIGHTED_OPS or node.domain not in ("", "ai.onnx"):
            continue
        found = _quantizers(graph, node, scales, ranges.weight_scales)
        if isinstance(found, str):
            if found:
                left_float[node_name(node)] = found
            continue
        sites.update(found)
        if node.op_type == "ConvTranspose" and found[node.output[0], 1].axis is None:
            transposed.add(node_name(node))
        quantized.append(node_name(node))
    sites, without_room = with_room(graph, sites)
    left_float.update(without_room)
    quantized = [name for name in quantized if name not in without_room]
    if not quantized:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_float.items())[:3])
        raise QuantizationError(
            f"The ranges quantize no layer of the model ({reasons or 'it has no layer with constant weights'}).",
            hint="Give a range for the input of at least one Conv, ConvTranspose, Gemm or MatMul.",
        )
    widened = tuple(name for name, scale in scales.items() if scale != ranges.scales[name])
    one_scale = tuple(name for name in quantized if name in transposed)
    return RangesApplied(put_in(model, sites), tuple(quantized), left_float, unknown, one_scale, widened)


def _refuse_unusable(others: Sequence[Wanted], ranges: DynamicRanges) -> None:
    for wanted in others:
        if wanted.tensor in ranges.unusable:
            raise QuantizationError(
                f"The scale of tensor {wanted.tensor!r}, which the layer of {wanted.site[0]!r} reads as INT8, is "
                f"{ranges.unusable[wanted.tensor]} in the ranges; it must be finite and greater than 0.",
                hint="Such a scale comes from a dead layer or a broken calibration. Calibrate again; or take its line "
                "out of the file, and the layer stays in float.",
            )


def ranges_of(model: onnx.ModelProto) -> DynamicRanges:
    """Return the scales of a model with Q/DQ, by the name of the float tensor.

    Of the weights of weighted layers only those that are not amax / 127 per output channel.

    Raises:
        QuantizationError: No activation has Q/DQ, a tensor has two scales, or a pair is not symmetric INT8 per tensor.
    """
    scales: dict[str, np.float32] = {}
    for pair in pairs(Graph(model.graph)):
        if pair.is_constant:
            continue
        name = node_name(pair.dequantize)
        if pair.quantizer is None or pair.quantizer.axis is not None:
            reason = pair.oddity or "it has a scale per channel"
            raise QuantizationError(f"The Q/DQ pair {name} of tensor {pair.tensor!r} is no dynamic range: {reason}.")
        scale = np.float32(pair.quantizer.scale)
        if scales.setdefault(pair.tensor, scale) != scale:
            raise QuantizationError(
                f"Tensor {pair.tensor!r} is quantized with two scales, {scales[pair.tensor]} and {scale} ({name}); a "
                "file of dynamic ranges holds one."
            )
    if not scales:
        raise QuantizationError("The model has no Q/DQ on an activation, so it has no dynamic ranges.")
    return DynamicRanges(scales, _unusual_weight_scales(model))


def without_qdq(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model without any Q/DQ; weights are float again.

    Weights that are stored as codes become the floats that the codes stand for; the original ones are not known.

    Raises:
        QuantizationError: INT8 codes come from, or go to, something else than Q/DQ.
    """
    stripped, _ = take_out(model, lambda _: True)
    rest = [node_name(node) for node in stripped.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    if rest:
        raise QuantizationError(f"The codes of {_some(rest)} are read by something else than a DequantizeLinear.")
    return stripped


def canonical_qdq(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the same computation with its Q/DQ in the form that ``quantize_with_ranges`` gives it.

    Names, constants, order and the sharing of pairs change; results do not, by a single bit. Weights that are stored as
    codes become floats with Q/DQ, and a bias of INT32 codes becomes float, which TensorRT wants. Pairs that are not
    symmetric INT8 stay as they are, for ``quantization_check`` to judge.
    """
    stripped, sites = take_out(model, lambda pair: pair.quantizer is not None or pair.is_bias)
    return put_in(stripped, sites)


def _sharing(wanted: Iterable[Wanted], scales: Mapping[str, np.float32]) -> dict[str, np.float32]:
    """Return the scales with the largest of each group for all of the group."""
    groups: dict[int, set[str]] = defaultdict(set)
    for each in wanted:
        if each.group is not None and each.tensor in scales:
            groups[each.group].add(each.tensor)
    shared = {name: max(scales[member] for member in group) for group in groups.values() for name in group}
    return {**scales, **shared}


def _quantizers(
    graph: Graph, node: onnx.NodeProto, scales: Mapping[str, np.float32], weight_scales: Mapping[str, Array]
) -> dict[Site, Quantizer] | str:
    """Return the quantizers of a layer's input and weights; or why it stays float, "" if it has no constant weights."""
    constant = [graph.constant(name) is not None for name in node.input[:2]]
    if not any(constant):
        return ""
    if all(constant):
        return "both of its inputs are constants"
    position = constant.index(True)
    if position == 0 and node.op_type != "MatMul":
        return "its first input is the constant one"
    activation, weight_name = node.input[1 - position], node.input[position]
    scale = scales.get(activation)
    if scale is None:
        return f"its input {activation!r} has no range"
    weight = graph.constant(weight_name)
    if weight is None or weight.dtype != np.float32:
        return "its weights are not float32"
    if not np.isfinite(weight).all():
        raise ModelError(f"The weights {weight_name!r} of {node_name(node)} are not finite.")
    of_weight = weight_scales.get(weight_name)
    axis = channel_axis(node, position, weight.ndim)
    if of_weight is None:
        chosen = chosen_weight_scale(node, position, weight)
        if isinstance(chosen, str):
            return chosen
        of_weight, axis = chosen
    elif of_weight.ndim and (axis is None or len(of_weight) != weight.shape[axis]):
        raise QuantizationError(
            f"The ranges have {len(of_weight)} scales for the weights {weight_name!r} of {node_name(node)}, whose "
            f"shape is {list(weight.shape)} with the output channels on axis {axis}."
        )
    output = node.output[0]
    return {
        (output, 1 - position): Quantizer(activation, np.asarray(scale)),
        (output, position): Quantizer(weight_name, of_weight, axis if of_weight.ndim else None),
    }


def _unusual_weight_scales(model: onnx.ModelProto) -> dict[str, Array]:
    """Return the scales of weights that ``apply_ranges`` would not choose by itself."""
    stripped, sites = take_out(model, lambda pair: pair.quantizer is not None)
    graph = Graph(stripped.graph)
    usual, found = dict(sites), dict[Site, Quantizer]()
    for (output, position), quantizer in sites.items():
        node = graph.producer[output]
        weight = graph.constant(quantizer.tensor)
        if weight is None or node.op_type not in WEIGHTED_OPS or position > 1:
            continue
        if quantizer.axis not in (None, channel_axis(node, position, weight.ndim)):
            raise QuantizationError(
                f"The weight {quantizer.tensor!r} of {node_name(node)} has its scales along axis {quantizer.axis}; a "
                "file of dynamic ranges holds one scale, or one per output channel."
            )
        found[output, position] = quantizer
        chosen = chosen_weight_scale(node, position, weight)
        if not isinstance(chosen, str):
            usual[output, position] = Quantizer(quantizer.tensor, *chosen)
        else:
            del usual[output, position]
    usual, _ = with_room(graph, usual)
    scales: dict[str, Array] = {}
    for site, quantizer in found.items():
        if site in usual and usual[site].key == quantizer.key:
            continue
        if scales.setdefault(quantizer.tensor, quantizer.scale).tobytes() != quantizer.scale.tobytes():
            raise QuantizationError(f"Weight {quantizer.tensor!r} is quantized in two ways; ranges hold one.")
    return scales


def require_float_model(model: onnx.ModelProto) -> None:
    """Refuse a model that is quantized already, or whose opset has no Q/DQ per channel.

    Raises:
        QuantizationError: It is one of these.
    """
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.op_type.startswith("QLinear"):
            raise QuantizationError(
                f"The model is quantized already ({node.op_type} {node_name(node)}), and ranges are for a float model.",
                hint="Build it as it is, with --precision explicit and without --ranges.",
            )
    version = opset_version(model)
    if version < LOWEST_OPSET:
        raise QuantizationError(
            f"The model uses opset {version}; Q/DQ with a scale per channel needs opset {LOWEST_OPSET} or later.",
            hint="Export it again with a newer opset, or convert it with onnx.version_converter.",
        )


def _activations(model: onnx.ModelProto) -> list[str]:
    return [*(value.name for value in model.graph.input), *(node.output[0] for node in model.graph.node if node.output)]


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
