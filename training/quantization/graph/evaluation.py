"""Which tensors of a traced network are one and the same in evaluation, where dropout and stochastic depth do nothing.

Exported, they are one tensor with one name, and what quantizes it is one Q/DQ pair.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn
from torch.nn import functional

from training.quantization.graph.tracing import graph_in_evaluation

NOTHING_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_DROPOUTS = {functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d}


def tensor_in_evaluation(node: fx.Node, module_of: Callable[[str], nn.Module]) -> fx.Node:
    """Return the node whose tensor the result of ``node`` is in evaluation: itself, or one before it.

    Args:
        node: Of the graph of a network.
        module_of: Returns a module of the network by name.
    """
    while len(node.all_input_nodes) == 1 and _does_nothing(node, module_of):
        node = node.all_input_nodes[0]
    return node


def _does_nothing(node: fx.Node, module_of: Callable[[str], nn.Module]) -> bool:
    if node.op == "call_module":
        module = module_of(str(node.target))
        return isinstance(module, NOTHING_MODULES) or _only_trains(module)
    return node.op == "call_function" and node.target in _DROPOUTS and _is_off(node)


def _is_off(dropout: fx.Node) -> bool:
    """Return whether a call of dropout says so; by default it drops in evaluation, too."""
    return dropout.kwargs.get("training", dropout.args[2] if len(dropout.args) > 2 else True) is False


def _only_trains(module: nn.Module) -> bool:
    """Return whether a module that was left whole, such as stochastic depth, returns what it is given."""
    graph = graph_in_evaluation(module)
    if graph is None:
        return False
    [result] = (node.args[0] for node in graph.nodes if node.op == "output")
    if not isinstance(result, fx.Node):
        return False
    return tensor_in_evaluation(result, module.get_submodule).op == "placeholder"
