"""Which tensors of a traced network want a quantizer, by TensorRT's rules.

Source: TensorRT Developer Guide, "Q/DQ Layer-Placement Recommendations", and the residual and concat rules of NVIDIA's
TensorFlow quantization toolkit and yolo_deepstream.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from training.quantization.graph.evaluation import NOTHING_MODULES, tensor_in_evaluation
from training.quantization.layers import computes_as, is_quantizable
from trtdeploy.onnxgraph.qdq.groups import Groups
from trtdeploy.onnxgraph.qdq.placement import Target

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MUL = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_DIV = {operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide, "div", "div_"}
_CLAMP = {
    functional.hardtanh,
    functional.hardtanh_,
    functional.relu6,
    torch.clamp,
    torch.clamp_,
    torch.clip,
    torch.clip_,
    "clamp",
    "clamp_",
    "clip",
    "clip_",
}
_CAT = {torch.cat, torch.concat, torch.concatenate}
_GATE = {torch.sigmoid, functional.sigmoid, functional.hardsigmoid, "sigmoid", "sigmoid_"}
_POOL = {
    functional.avg_pool1d,
    functional.avg_pool2d,
    functional.avg_pool3d,
    functional.adaptive_avg_pool1d,
    functional.adaptive_avg_pool2d,
    functional.adaptive_avg_pool3d,
}
_MEAN = {torch.mean, "mean"}
_GATE_MODULES = (nn.Sigmoid, nn.Hardsigmoid)
_CLAMP_MODULES = (nn.Hardtanh,)  # ReLU6 is one
_POOL_MODULES = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_COMMUTE_MODULES = (*NOTHING_MODULES, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Flatten)
_COMMUTE = {functional.dropout, functional.max_pool2d, torch.flatten, "flatten"}


@dataclass(frozen=True)
class Wanted:
    """An input of a node that wants a quantizer.

    Attributes:
        node: Who reads.
        tensor: Who makes the tensor.
        reason: ``input``, ``residual``, ``gate``, ``pooling``, ``concat``, ``operand`` or ``activation``.
    """

    node: fx.Node
    tensor: fx.Node
    reason: str


@dataclass(frozen=True)
class Placement:
    """The sites, and for each tensor the tensor whose quantizer it uses: concatenated ones share.

    So do those that are one tensor in evaluation.
    """

    sites: tuple[Wanted, ...]
    representative: dict[fx.Node, fx.Node]


class Placer:
    """Applies the rules to one graph.

    Args:
        graph: With shapes, as ``tracing.trace`` returns it.
        modules: Of the float network, by name.
        skips: Whether a layer stays in float.
        target: Whose rules hold. ONNX Runtime fuses an op into its INT8 kernel where all that it reads and what it
            makes has Q/DQ.
    """

    def __init__(
        self, graph: fx.Graph, modules: dict[str, nn.Module], skips: Callable[[str], bool], *, target: Target
    ) -> None:
        self._target = target
        self._graph = graph
        self._modules = modules
        self._skips = skips
        self._constants = _constants(graph)

    def place(self) -> Placement:
        """Return where quantizers go."""
        sites: list[Wanted] = []
        for node in self._graph.nodes:
            sites += self._of(node)
        return self._grouped(sites)

    def _of(self, node: fx.Node) -> list[Wanted]:
        operands = [given for given in node.all_input_nodes if "tensor_meta" in given.meta]
        if self._is_layer(node):
            name = str(node.target)
            if self._skips(name) or not is_quantizable(self._modules[name]):
                return []
            return [Wanted(node, node.all_input_nodes[0], "input")]
        if self._target == "onnxruntime":
            return self._of_any(node, operands)
        if self._is(node, _POOL, _POOL_MODULES) or self._is_spatial_mean(node):
            return [Wanted(node, operands[0], "pooling")]
        if len(operands) != 2 or not self._constants.isdisjoint(operands):
            return []
        if self._is(node, _ADD):
            other = self._residual(*operands)
            return [Wanted(node, other, "residual")] if other is not None else []
        if self._is(node, _MUL) and self._is_gated(*operands):
            return [Wanted(node, operand, "gate") for operand in operands]
        return []

    def _of_any(self, node: fx.Node, operands: list[fx.Node]) -> list[Wanted]:
        if self._is(node, _POOL, _POOL_MODULES) or self._is_spatial_mean(node):
            return [Wanted(node, operands[0], "pooling")]
        if self._is(node, _ADD | _MUL) and len(self._variables(node)) == 2:
            return [Wanted(node, operand, "operand") for operand in operands]
        if self._is(node, _GATE, _GATE_MODULES):
            return [Wanted(node, operand, "activation") for operand in operands]
        if "tensor_meta" not in node.meta or node.op == "output" or self._is(node, _CAT) or self._is_switch(node):
            return []
        if self._is(node, _COMMUTE, (*_COMMUTE_MODULES, *_NORMS)):
            return []
        # What reads the result of a kernel gives that result its codes.
        kernels = [operand for operand in operands if self._is_branch(operand) or self._is(operand, _ADD | _MUL)]
        return [Wanted(node, operand, "activation") for operand in kernels]

    def _residual(self, first: fx.Node, second: fx.Node) -> fx.Node | None:
        """Return the operand of an add that does not fuse with it."""
        from_first, from_second = self._is_branch(first), self._is_branch(second)
        if from_first and from_second:
            return _nearer(first, second)
        if not from_first and not from_second:
            return None
        return second if from_first else first

    def _is_branch(self, node: fx.Node) -> bool:
        """Return whether a tensor is a convolution's, but for batch norm and what does nothing in evaluation."""
        while not self._is_layer(node):
            if not (self._is(node, {functional.dropout}, (*_NORMS, *NOTHING_MODULES)) or self._is_switch(node)):
                return False
            if not node.all_input_nodes:
                return False
            node = node.all_input_nodes[0]
        return not isinstance(self._modules[str(node.target)], nn.Linear)

    def _is_gated(self, first: fx.Node, second: fx.Node) -> bool:
        for gate, features in ((first, second), (second, first)):
            if not self._is_gate(gate, features):
                continue
            shape, full = gate.meta["tensor_meta"].shape, features.meta["tensor_meta"].shape
            if len(shape) == len(full) > 2 and all(size == 1 for size in shape[2:]):
                return True
        return False

    def _is_gate(self, tensor: fx.Node, features: fx.Node) -> bool:
        """Return whether a tensor is a sigmoid or hard sigmoid of something else than what it is multiplied with."""
        if self._is(tensor, _GATE, _GATE_MODULES):
            return tensor.all_input_nodes[0] is not features
        # a hard sigmoid written by hand: clamp(x + 3, 0, 6) / 6
        if not self._is(tensor, _MUL | _DIV) or len(clamped := self._variables(tensor)) != 1:
            return False
        if not self._is(clamped[0], _CLAMP, _CLAMP_MODULES):
            return False
        shifted = clamped[0].all_input_nodes[0]
        return self._is(shifted, _ADD) and features not in shifted.all_input_nodes

    def _variables(self, node: fx.Node) -> list[fx.Node]:
        """Return the tensors that an operation on two operands reads, but for constants; twice what it reads twice."""
        read = [given for given in (*node.args, *node.kwargs.values()) if isinstance(given, fx.Node)]
        return [given for given in read if "tensor_meta" in given.meta and given not in self._constants]

    def _grouped(self, sites: list[Wanted]) -> Placement:
        """Add what concatenations want; one range has what is concatenated, and what is one tensor in evaluation."""
        wanted = {site.tensor for site in sites}
        groups: Groups[fx.Node] = Groups()
        for node in reversed(list(self._graph.nodes)):  # a concatenation of concatenations: the last one decides
            if not self._is(node, _CAT):
                continue
            results = list(self._commuting_results(node))
            if not any(result in wanted for result in results):
                continue
            for operand in node.all_input_nodes:
                sites.append(Wanted(node, operand, "concat"))
                wanted.add(operand)
                groups.join(node, operand)
            for result in results:
                if result in wanted:
                    groups.join(node, result)
        for tensor in wanted:
            groups.join(tensor_in_evaluation(tensor, self._modules.__getitem__), tensor)
        return Placement(tuple(sites), {tensor: groups.leader(tensor) for tensor in wanted})

    def _commuting_results(self, node: fx.Node) -> Iterable[fx.Node]:
        yield node
        for user in node.users:
            if self._is(user, _COMMUTE, _COMMUTE_MODULES):
                yield from self._commuting_results(user)

    def _is_layer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and computes_as(self._modules[str(node.target)]) is not None

    def _is_switch(self, node: fx.Node) -> bool:
        """Return whether a node is a module without weights that was left whole, such as stochastic depth."""
        if node.op != "call_module" or len(node.all_input_nodes) != 1:
            return False
        module = self._modules[str(node.target)]
        return "training" in type(module).forward.__code__.co_names and not list(module.parameters())

    def _is_spatial_mean(self, node: fx.Node) -> bool:
        if not self._is(node, _MEAN):
            return False
        rank = len(node.all_input_nodes[0].meta["tensor_meta"].shape)
        given: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else ())
        axes = given if isinstance(given, (tuple, list)) else (given,)
        return rank > 2 and {axis % rank for axis in axes} == set(range(2, rank))

    def _is(self, node: fx.Node, targets: set[Any], modules: tuple[type[nn.Module], ...] = ()) -> bool:
        if node.op == "call_module":
            return bool(modules) and isinstance(self._modules[str(node.target)], modules)
        return node.op in ("call_function", "call_method") and node.target in targets


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """Return the parameters and buffers, and what is made of nothing else: exported, these are constants."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (node.all_input_nodes and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def _nearer(first: fx.Node, second: fx.Node) -> fx.Node:
    """Return the operand with the shorter path to the nearest common ancestor: the shortcut. In doubt the second."""
    above, beside = _ancestors(first), _ancestors(second)
    shared = [node for node in above if node in beside]
    if not shared:
        return second
    nearest = min(shared, key=lambda node: above[node] + beside[node])
    return first if above[nearest] < beside[nearest] else second


def _ancestors(node: fx.Node) -> dict[fx.Node, int]:
    """Return every node that leads to this one, with the length of the shortest path."""
    distance = {node: 0}
    waiting = deque([node])
    while waiting:
        current = waiting.popleft()
        for before in current.all_input_nodes:
            if before not in distance:
                distance[before] = distance[current] + 1
                waiting.append(before)
    return distance
