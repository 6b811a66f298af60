"""Tracing a network with torch.fx without losing what differs between training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from training.quantization.layers import WEIGHTED


class UntraceableError(Exception):
    """The network has no graph that holds for every input and in both modes; the message says why."""


class _Tracer(fx.Tracer):
    """A tracer that does not look into modules which compute something else in training."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Subclasses of layers too: what is in them is their own affair.
        whole = super().is_leaf_module(m, module_qualified_name) or isinstance(m, WEIGHTED)
        return whole or depends_on_mode(m)


def trace(model: nn.Module, example: Tensor) -> fx.Graph:
    """Return the graph of a network, each node with the shape of its result (``meta["tensor_meta"]``).

    A module whose own graph differs between training and evaluation stays one node, so it goes on switching.

    Raises:
        UntraceableError: Its control flow depends on data, or the graph differs between the modes all the same.
    """
    graphs = []
    for training in (True, False):
        with _mode(model, training=training):
            try:
                graphs.append(_Tracer().trace(model))
            except Exception as error:  # somebody else's forward may fail in any way on a proxy
                raise UntraceableError(f"{type(error).__name__}: {error}") from error
    if str(graphs[0]) != str(graphs[1]):
        raise UntraceableError(f"{type(model).__name__}.forward computes something else in training")
    with _mode(model, training=False), torch.no_grad():
        ShapeProp(fx.GraphModule(model, graphs[1])).propagate(example)
    return graphs[1]


def depends_on_mode(module: nn.Module) -> bool:
    """Return whether the forward of a module, apart from those of its leaves, differs between the two modes."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or "training" not in code.co_names:
        return False
    texts = set()
    for training in (True, False):
        with _mode(module, training=training):
            try:
                texts.add(str(_Tracer().trace(module)))
            except Exception:  # it cannot be looked into, so it stays one
                return True
    return len(texts) > 1


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training
