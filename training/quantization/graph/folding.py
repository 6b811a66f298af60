"""Batch norm folded into convolutions, and SiLU taken apart: what ONNX Runtime's INT8 kernels need to fuse."""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norms(model: nn.Module, graph: fx.Graph) -> None:
    """Fold every batch norm that alone reads a convolution; in the model an Identity stands in its place."""
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        norm, before = model.get_submodule(str(node.target)), node.all_input_nodes[0]
        if type(norm) not in _NORMS or before.op != "call_module" or len(before.users) != 1:
            continue
        convolution = model.get_submodule(str(before.target))
        if not isinstance(convolution, _CONVOLUTIONS) or not isinstance(norm, _NORMS):
            continue
        once = calls[str(node.target)] == calls[str(before.target)] == 1
        mean, variance = norm.running_mean, norm.running_var
        if type(convolution) not in _CONVOLUTIONS or not once or mean is None or variance is None:
            continue
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, mean, variance, norm.eps, norm.weight, norm.bias
        )
        node.replace_all_uses_with(before)
        graph.erase_node(node)
        parent, _, name = str(node.target).rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())


def take_silu_apart(model: nn.Module, graph: fx.Graph) -> None:
    """Write SiLU as a product: ONNX has no op for it, and its sigmoid has an INT8 kernel where its result has codes."""
    for node in list(graph.nodes):
        is_module = node.op == "call_module" and type(model.get_submodule(str(node.target))) is nn.SiLU
        if not (is_module or (node.op == "call_function" and node.target is functional.silu)):
            continue
        given = node.all_input_nodes[0]
        with graph.inserting_before(node):
            gate = graph.call_function(torch.sigmoid, (given,))
            product = graph.call_function(operator.mul, (given, gate))
        gate.meta, product.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
