"""Which inputs of which nodes of a float graph want Q/DQ for explicit INT8.

Source: "Q/DQ placement recommendations" in TensorRT's developer guide.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto

from trtdeploy.onnxgraph.graph import WEIGHTED_OPS, Graph
from trtdeploy.onnxgraph.qdq.groups import Groups
from trtdeploy.onnxgraph.qdq.pairs import Site
from trtdeploy.onnxgraph.tensor_types import tensor_types

Target = Literal["tensorrt", "onnxruntime"]
Reason = Literal["input", "weight", "residual", "gate", "pooling", "concat", "operand", "activation"]

_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
_BEHIND_CONVOLUTION = frozenset({"BatchNormalization", "Identity", "Dropout"})
_POOLS = frozenset({"AveragePool", "GlobalAveragePool"})
_SQUEEZES = frozenset({"GlobalAveragePool", "GlobalMaxPool"})
_COMMUTES = frozenset({"MaxPool", "Flatten", "Identity", "Dropout"})


@dataclass(frozen=True)
class Wanted:
    """An input that wants Q/DQ.

    Attributes:
        site: The input.
        tensor: What it reads.
        reason: Why it is quantized.
        group: Sites of one group share one scale; None where the tensor has its own.
    """

    site: Site
    tensor: str
    reason: Reason
    group: int | None = None


def wanted_sites(model: onnx.ModelProto, *, target: Target = "tensorrt") -> list[Wanted]:
    """Return the inputs that want Q/DQ, in the order of the nodes.

    Input and weight of every weighted op; of a residual Add the operand that is no convolution, since the other one
    fuses with it; both inputs of a squeeze-and-excitation multiply; the input of average pooling; and of a Concat that
    a quantized op reads every input, with one scale. Never a tensor between a convolution and its activation.

    Args:
        model: A float model.
        target: ``onnxruntime`` runs an op in integers where all that it reads and what it makes has Q/DQ: it wants both
            operands of every Add and Mul, and what reads the result of a convolution, an Add or a Mul.
    """
    graph = Graph(model.graph)
    found = [wanted for node in model.graph.node if node.output for wanted in _of_node(graph, node, target)]
    return _with_concats(graph, found)


def float32_sites(model: onnx.ModelProto, sites: Iterable[Wanted]) -> list[Wanted]:
    """Leave out what is known not to be float32: sums of indices and sizes, and parts of the model in FP16.

    Of a node that wants Q/DQ on several inputs all or none is left out; tensors of unknown type are taken for float32.
    """
    sites = list(sites)
    types = tensor_types(model)
    others = {each.site for each in sites if types.get(each.tensor, TensorProto.FLOAT) != TensorProto.FLOAT}
    nodes = {each.site[0] for each in sites if each.site in others and each.reason != "activation"}
    return [each for each in sites if each.site not in others and each.site[0] not in nodes]


def _of_node(graph: Graph, node: onnx.NodeProto, target: Target) -> Iterator[Wanted]:
    name = node.output[0]
    constant = [graph.constant(read) is not None for read in node.input[:2]]
    if node.op_type in WEIGHTED_OPS and sum(constant) == 1 and (constant[1] or node.op_type == "MatMul"):
        for position in (0, 1):
            yield Wanted((name, position), node.input[position], "weight" if constant[position] else "input")
        return
    # a bias or a factor that is computed from constants is no branch of the network
    constant = [read in graph.constants for read in node.input[:2]]
    if node.op_type in _POOLS or (node.op_type == "ReduceMean" and _over_image(graph, node)):
        yield Wanted((name, 0), node.input[0], "pooling")
    elif target == "onnxruntime":
        yield from _for_integer_kernels(graph, node, any(constant))
    elif node.op_type == "Add" and not any(constant):
        for position in _residual(graph, node):
            yield Wanted((name, position), node.input[position], "residual")
    elif node.op_type == "Mul" and not any(constant) and _is_gated(graph, node):
        for position in (0, 1):
            yield Wanted((name, position), node.input[position], "gate")


def _for_integer_kernels(graph: Graph, node: onnx.NodeProto, has_constant: bool) -> Iterator[Wanted]:
    if node.op_type in ("Add", "Mul") and not has_constant:
        for position in (0, 1):
            yield Wanted((node.output[0], position), node.input[position], "operand")
    elif node.op_type in ("Sigmoid", "HardSigmoid"):
        yield Wanted((node.output[0], 0), node.input[0], "activation")
    elif node.op_type not in _COMMUTES | {"BatchNormalization", "Concat", "Shape", "Size"}:
        for position, read in enumerate(node.input):
            maker = graph.producer.get(read) if read not in graph.constants else None
            if maker is not None and (maker.op_type in ("Add", "Mul") or _is_convolution(graph, read)):
                yield Wanted((node.output[0], position), read, "activation")


def _residual(graph: Graph, node: onnx.NodeProto) -> list[int]:
    branches = [_is_convolution(graph, read) for read in node.input]
    if not any(branches):
        return []
    if not all(branches):
        return [branches.index(False)]
    above = [_ancestors(graph, read) for read in node.input]
    shared = above[0].keys() & above[1].keys()
    if not shared:
        return [1]
    nearest = min(shared, key=lambda tensor: (above[0][tensor] + above[1][tensor], tensor))
    return [0 if above[0][nearest] < above[1][nearest] else 1]


def _is_convolution(graph: Graph, tensor: str) -> bool:
    node = graph.producer.get(tensor)
    while node is not None and node.op_type in _BEHIND_CONVOLUTION:
        node = graph.producer.get(node.input[0])
    return node is not None and node.op_type in _CONVOLUTIONS


def _ancestors(graph: Graph, tensor: str) -> dict[str, int]:
    """Return every tensor that leads to this one, with the number of nodes in between."""
    distance = {tensor: 0}
    queue = deque([tensor])
    while queue:
        node = graph.producer.get(current := queue.popleft())
        for read in node.input if node is not None else ():
            if read and read not in distance and graph.constant(read) is None:
                distance[read] = distance[current] + 1
                queue.append(read)
    return distance


def _is_gated(graph: Graph, node: onnx.NodeProto) -> bool:
    return any(_is_gate(graph, node.input[i], node.input[1 - i]) and _is_squeezed(graph, node.input[i]) for i in (0, 1))


def _is_squeezed(graph: Graph, tensor: str) -> bool:
    """Say whether all of a tensor's values come from pooling over the image: one number per channel, not per pixel.

    A sigmoid over pixels, as of GELU's approximation or of spatial attention, fuses with what it is multiplied with.
    """
    seen = {tensor}
    ahead = [tensor]
    while ahead:
        node = graph.producer.get(ahead.pop())
        if node is None:
            return False
        if node.op_type in _SQUEEZES or (node.op_type == "ReduceMean" and _over_image(graph, node)):
            continue
        if node.op_type in ("Shape", "Size"):
            continue
        ahead += [read for read in node.input if read and read not in seen and graph.constant(read) is None]
        seen.update(node.input)
    return True


def _is_gate(graph: Graph, tensor: str, other: str) -> bool:
    """Say whether a tensor is a sigmoid or hard sigmoid of something else than what it is multiplied with."""
    node = graph.producer.get(tensor)
    while node is not None and node.op_type in ("Mul", "Div"):  # clip(x + 3) / 6
        reads = [read for read in node.input if graph.constant(read) is None]
        if len(reads) != 1 or graph.maker(reads[0], "Clip") is None:
            return False
        node = graph.producer.get(reads[0])
    if node is None:
        return False
    if node.op_type in ("Sigmoid", "HardSigmoid"):
        differs: bool = node.input[0] != other
        return differs
    shifted = graph.maker(node.input[0], "Add") if node.op_type == "Clip" else None
    return shifted is not None and other not in shifted.input and tensor not in node.output


def _over_image(graph: Graph, node: onnx.NodeProto) -> bool:
    axes = next((list(entry.ints) for entry in node.attribute if entry.name == "axes"), None)
    if axes is None and len(node.input) > 1:
        given = graph.constant(node.input[1])
        axes = None if given is None else np.ravel(given).tolist()
    spatial: bool = axes is not None and sorted(axes) in ([2, 3], [-2, -1])
    return spatial


def _with_concats(graph: Graph, found: list[Wanted]) -> list[Wanted]:
    """Add the inputs of every Concat that a quantized op reads, and put what shares a scale into one group."""
    order = {node.output[0]: place for place, node in enumerate(graph.graph.node) if node.output}
    groups: Groups[str] = Groups()
    joined: set[str] = set()
    wanted = {each.tensor for each in found}
    for node in reversed(graph.graph.node):
        results = list(_commuting_results(graph, node)) if node.op_type == "Concat" else []
        if wanted.isdisjoint(results):
            continue
        found += [Wanted((node.output[0], i), read, "concat") for i, read in enumerate(node.input)]
        wanted.update(node.input)
        for tensor in [*node.input, *results]:
            joined.add(tensor)
            groups.join(node.output[0], tensor)
    numbers: dict[str, int] = {}
    ordered = sorted(found, key=lambda each: (order[each.site[0]], each.site[1]))
    return [
        replace(each, group=numbers.setdefault(groups.leader(each.tensor), len(numbers)))
        if each.tensor in joined
        else each
        for each in ordered
    ]


def _commuting_results(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Yield the result of a node, and what max pooling and the like make of it without changing the values."""
    yield node.output[0]
    for reader in graph.consumers[node.output[0]]:
        if reader.op_type in _COMMUTES and reader.input[0] == node.output[0]:
            yield from _commuting_results(graph, reader)
