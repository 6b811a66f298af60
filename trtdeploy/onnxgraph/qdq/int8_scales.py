"""Scales of symmetric INT8: of activations, of weights, and of weights beside a bias.

The rules are stated here once, for PTQ, files of ranges, the linter's repairs and ``training``.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx

from trtdeploy.onnxgraph.graph import WEIGHTED_OPS, Graph, dequantized_constant, int_attribute, node_name
from trtdeploy.onnxgraph.qdq.dynamic_ranges import INT8_BOUND
from trtdeploy.onnxgraph.qdq.pairs import Quantizer, Site
from trtdeploy.tensors import Array

SMALLEST_AMAX = np.float32(1e-8)
"""Stands for a smaller amax, whose scale of 0 TensorRT refuses."""

DEAD_AMAX = np.float32(1)
"""Stands for the amax of an activation that was 0 throughout: any range holds it, and this one also most of what may
come later. ONNX Runtime's quantizer and pytorch-quantization give such a tensor the scale 1."""

FEWEST_CODES = 8
"""With one scale for several channels, the largest |w| of each must reach this code. Rounding, which moves a weight by
half a code at most, then moves it by a sixteenth of the channel's largest at most; below that a channel is lost."""

TransposedWeights = Literal["per-tensor", "per-channel"]
"""How the weight of a ConvTranspose is quantized."""

_AIMED_BIAS_CODE, _LARGEST_BIAS_CODE = 2.0**29, 2.0**30


def activation_scale(amax: float) -> Array:
    """Return amax / 127 of an activation as float32 of shape (); that of ``DEAD_AMAX`` where amax is 0."""
    largest = np.maximum(np.float32(amax), SMALLEST_AMAX) if amax else DEAD_AMAX
    return np.asarray(largest / np.float32(INT8_BOUND))


def weight_scale(weight: Array, axis: int | None) -> Array:
    """Return amax / 127 of a float32 weight per channel of ``axis``, or of all of it; shape (channels,) or ().

    Source: pytorch-quantization and TensorRT take the maximum for weights. A dead channel gets the scale of
    ``SMALLEST_AMAX``; beside a bias ``with_room`` gives it a larger one.
    """
    scale: Array = np.maximum(_amax(weight, axis), SMALLEST_AMAX, dtype=np.float32) / np.float32(INT8_BOUND)
    return scale.reshape(()) if scale.size == 1 else scale


def chosen_weight_scale(
    node: onnx.NodeProto, position: int, weight: Array, *, transposed: TransposedWeights = "per-tensor"
) -> tuple[Array, int | None] | str:
    """Return the scale of a layer's weight and its axis, None for one scale; or why the layer should stay in float.

    Per output channel, but of a ConvTranspose one for all: pytorch-quantization and ModelOpt for torch write its scales
    along axis 0, ModelOpt for ONNX along axis 1, and NVIDIA's answers contradict each other (NVIDIA/TensorRT#1694,
    #1699, #1519, #2380). One scale means the same everywhere. Where a channel is so small that it would be lost with
    it, and where groups spread the output channels over both axes, no scale is right.

    Args:
        node: The layer.
        position: Which of its inputs the weight is, 0 or 1.
        weight: float32.
        transposed: ``per-channel``: along axis 1 of a ConvTranspose, its output channels.
    """
    axis = channel_axis(node, position, weight.ndim)
    if node.op_type == "ConvTranspose":
        if int_attribute(node, "group", 1) != 1:
            return "its output channels are spread over the groups, so that they would have to share scales"
        if transposed == "per-tensor":
            scale = weight_scale(weight, None)
            lost = lost_channels(weight, axis, scale)
            return f"{_lost(lost, weight.shape[1])} if all share one scale" if lost else (scale, None)
    scale = weight_scale(weight, axis)
    return scale, axis if scale.ndim else None


def lost_channels(weight: Array, axis: int | None, scale: Array) -> int:
    """Return how many output channels one scale leaves fewer than ``FEWEST_CODES`` codes, of those that are not 0."""
    if axis is None or scale.ndim or weight.shape[axis] == 1:
        return 0
    amax = _amax(weight, axis)
    return int(((amax > 0) & (amax < FEWEST_CODES * scale)).sum())


def smallest_scale(bias: Any, input_scale: Any) -> Any:
    """Return the smallest scale of a weight beside which a bias fits into INT32 with room.

    Integer kernels add the bias to the INT32 sum of the products of codes, as the code ``bias / (input_scale *
    weight_scale)`` (TensorFlow Lite's quantization specification; QLinearConv of ONNX; ONNX Runtime's optimizer makes
    it of a float bias, and overflows where it is larger). Here that code is 2**29, and up to 2**30 one is left alone:
    half of INT32 is left to the sum, enough for 66,000 products of the largest codes.

    A larger scale costs nothing in a channel of its own: rounding moves a sum of n products by at most ``n * 127 *
    input_scale * weight_scale / 2``, that is by ``n * 127 / 2**30`` of the bias, which is what float32 itself loses
    when it adds n products to that bias, up to a factor of 2. What other channels lose, ``lost_channels`` says.

    Args:
        bias: Of each channel; numpy's or torch's array, or a number.
        input_scale: Of the layer's input; the same.
    """
    return abs(bias) / (input_scale * _AIMED_BIAS_CODE)


def is_too_small(scale: Any, smallest: Any) -> Any:
    """Say, per channel, whether a bias has a code above 2**30 with this scale; ``smallest`` as from ``smallest_scale``.

    Twice what that aims at, so that a scale is not changed for the sake of a rounding.
    """
    return scale * (_LARGEST_BIAS_CODE / _AIMED_BIAS_CODE) < smallest


def with_room(graph: Graph, sites: dict[Site, Quantizer]) -> tuple[dict[Site, Quantizer], dict[str, str]]:
    """Give the weights of all layers scales that leave their bias room, see ``smallest_scale``.

    Layers that read one weight through the same quantizer get the same scale, the largest.

    Args:
        graph: The float graph.
        sites: Its quantizers.

    Returns:
        All sites but those of layers for whose bias no scale is right; why, by the layers' names.
    """
    raised: dict[tuple[str, bytes, int | None], Array] = {}
    weights: dict[Site, onnx.NodeProto] = {}
    for node in graph.graph.node:
        for position in _weight_positions(graph, node, sites):
            quantizer, given = sites[node.output[0], position], sites[node.output[0], 1 - position]
            weights[node.output[0], position] = node
            weight = graph.constant(quantizer.tensor)
            rank = 0 if weight is None else weight.ndim
            smallest = smallest_beside_bias(graph, node, position, rank, quantizer.scale, given.scale)
            if smallest is not None and is_too_small(quantizer.scale, smallest).any():
                scale = raised.get(quantizer.key, quantizer.scale)
                smallest = np.where(is_too_small(quantizer.scale, smallest), smallest, 0).astype(np.float32)
                raised[quantizer.key] = np.maximum(scale, smallest)
    roomy, left = dict(sites), {}
    for site, node in weights.items():
        quantizer = sites[site]
        scale = raised.get(quantizer.key, quantizer.scale)
        if scale is quantizer.scale:
            continue
        weight = graph.constant(quantizer.tensor)
        lost = 0 if weight is None else lost_channels(weight, channel_axis(node, site[1], weight.ndim), scale)
        if weight is not None and lost:
            roomy.pop((site[0], 0), None), roomy.pop((site[0], 1), None)
            channels = weight.shape[channel_axis(node, site[1], weight.ndim) or 0]
            left[node_name(node)] = f"{_lost(lost, channels)} with the one scale that its bias needs to fit into INT32"
        else:
            roomy[site] = Quantizer(quantizer.tensor, np.asarray(scale), quantizer.axis)
    return roomy, left


def smallest_beside_bias(
    graph: Graph, node: onnx.NodeProto, position: int, rank: int, scale: Array, input_scale: Array
) -> Array | None:
    """Return the smallest scale of a layer's weight beside its bias, in the shape of ``scale``; None without a bias.

    Args:
        graph: The graph.
        node: The layer.
        position: Which of its inputs the weight is.
        rank: Number of dimensions of the weight.
        scale: Of the weight, of shape () or (channels,).
        input_scale: Of the other input, of shape ().
    """
    biases = _largest_biases(graph, node, _channels_from_end(node, position, rank))
    if biases is None or input_scale.size != 1:
        return None
    if scale.size == 1 or biases.size % scale.size:
        biases = biases.max(keepdims=True)  # one scale for all, or scales that are not those of output channels
    elif biases.size != 1:
        biases = biases.reshape(-1, scale.size).max(0)  # of groups that share scales
    smallest = np.broadcast_to(smallest_scale(biases, input_scale.astype(np.float64).reshape(())), scale.size)
    return np.asarray(smallest.reshape(scale.shape))


def channel_axis(node: onnx.NodeProto, position: int, rank: int) -> int | None:
    """Return the output-channel axis of the weight of a weighted op; None where it has none.

    Source: the weight layouts of https://onnx.ai/onnx/operators/: Conv (M, C/group, ...), ConvTranspose (C, M/group,
    ...), Gemm (K, N) or with transB (N, K), MatMul (..., K, N), or (..., M, K) where the weight comes first.

    Args:
        node: The op.
        position: Which of its inputs the weight is, 0 or 1.
        rank: Number of dimensions of the weight.
    """
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if int_attribute(node, "transB", 0) else 1
    if rank < 2:
        return None  # the only axis is the one that is summed over
    return rank - 1 if position == 1 else rank - 2


def _amax(weight: Array, axis: int | None) -> Array:
    others = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis)
    return np.asarray(np.abs(weight).max(axis=others, initial=0))


def _lost(lost: int, channels: int) -> str:
    return f"{lost} of its {channels} output channels would keep fewer than {FEWEST_CODES} of 127 codes"


def _weight_positions(graph: Graph, node: onnx.NodeProto, sites: dict[Site, Quantizer]) -> list[int]:
    """Return which inputs of a node are weights with a quantizer, where the other input has one, too."""
    if node.op_type not in WEIGHTED_OPS or not node.output or not {(node.output[0], i) for i in (0, 1)} <= sites.keys():
        return []
    return [i for i in (0, 1) if graph.constant(sites[node.output[0], i].tensor) is not None]


def _largest_biases(graph: Graph, node: onnx.NodeProto, from_end: int) -> Array | None:
    """Return the largest |bias| of each output channel, or of all of them as one; None without a constant bias.

    The bias of MatMul is what an Add behind it adds, and ONNX Runtime makes a Gemm of both.
    """
    biases: list[Array] = []
    own = _constant(graph, node.input[2]) if node.op_type != "MatMul" and len(node.input) > 2 else None
    if own is not None:
        factor = 1.0
        if node.op_type == "Gemm":
            attributes = {entry.name: entry.f for entry in node.attribute}
            alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
            factor = max(1.0, abs(beta / alpha)) if alpha else 1.0  # an optimizer may take them into account, or not
        biases.append(_per_channel(own, 1) * factor)
    readers = graph.consumers[node.output[0]]
    if len(readers) == 1 and readers[0].op_type == "Add" and len(readers[0].input) == 2:
        [other] = [name for name in readers[0].input if name != node.output[0]] or [""]
        added = _constant(graph, other) if other else None
        if added is not None:
            biases.append(_per_channel(added, from_end))
    if not biases:
        return None
    total: Array = biases[0] if len(biases) == 1 else biases[0] + biases[1]
    return total if total.size else None


def _channels_from_end(node: onnx.NodeProto, position: int, rank: int) -> int:
    """Return where the output channels lie in a layer's result, counted from the end; 0 where there are none."""
    if node.op_type == "Gemm":
        return 1
    if node.op_type == "MatMul":
        return 0 if rank < 2 else 2 - position
    return rank - 1


def _per_channel(values: Array, from_end: int) -> Array:
    magnitudes = np.abs(values.astype(np.float64))
    magnitudes = np.where(np.isfinite(magnitudes), magnitudes, 0)  # no code stands for infinity
    if not from_end or magnitudes.ndim < from_end:
        return np.asarray(magnitudes.max(initial=0)).reshape(1)
    others = tuple(i for i in range(magnitudes.ndim) if i != magnitudes.ndim - from_end)
    return np.asarray(magnitudes.max(axis=others, initial=0))


def _constant(graph: Graph, name: str) -> Array | None:
    """Return the floats of a constant, which may be stored as codes or have Q/DQ."""
    values = graph.constant(name)
    if values is None:
        dequantize = graph.maker(name, "DequantizeLinear")
        values = None if dequantize is None else dequantized_constant(graph, dequantize)
    return values if values is not None and values.dtype.kind == "f" else None
