"""Tracing a network with torch.fx without losing what differs between training and evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from training.quantization.layers import WEIGHTED

_IN_PLACE_OPERATORS = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"}


class UntraceableError(Exception):
    """The network has no graph that holds for every input and in both modes; the message says why."""


@dataclass(frozen=True)
class Traced:
    """A graph, each node with the shape of its result (``meta["tensor_meta"]``), and what it does not show.

    Attributes:
        whole: Modules with submodules that are one node, by name, and why.
    """

    graph: fx.Graph
    whole: dict[str, str]


class _FailedInError(Exception):
    """Tracing failed in the module of this name."""


class _Tracer(fx.Tracer):
    """A tracer that does not look into modules which compute something else in training, nor into ``whole``."""

    def __init__(self, whole: Collection[str] = ()) -> None:
        super().__init__()
        self._whole = whole
        self.mode_dependent: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) is nn.Identity:  # what goes in comes out: one tensor, which gets one quantizer
            return False
        # Subclasses of layers too: what is in them is their own affair.
        if super().is_leaf_module(m, module_qualified_name) or isinstance(m, WEIGHTED):
            return True
        if depends_on_mode(m):
            self.mode_dependent.add(module_qualified_name)
            return True
        return module_qualified_name in self._whole

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except _FailedInError:
            raise
        except Exception as error:  # somebody else's forward may fail in any way on a proxy
            raise _FailedInError(self.path_of_module(m)) from error


def trace(model: nn.Module, *example: Any) -> Traced:
    """Return the graph of a network.

    Inputs that ``example`` does not give, or gives as something else than tensors, are fixed to what they are then.

    A module whose own graph differs between training and evaluation stays one node, so it goes on switching; so does
    one that cannot be traced. What reads a tensor after an operation in place has changed it reads that operation's
    result in the graph.

    Raises:
        UntraceableError: The control flow of the network's own forward depends on data, or its graph differs between
            the modes.
    """
    whole: dict[str, str] = {}
    fixed = _fixed_inputs(model, example)
    while True:
        try:
            graph, mode_dependent = _trace_both(model, whole, fixed)
            break
        except _FailedInError as error:
            name, cause = str(error), error.__cause__
            if name in whole:
                raise UntraceableError(f"in {name}: {type(cause).__name__}: {cause}") from error
            whole[name] = f"{type(cause).__name__}: {cause}"
    whole |= dict.fromkeys(mode_dependent, "it computes something else in training")
    with _mode(model, training=False), torch.no_grad():
        ShapeProp(fx.GraphModule(model, graph)).propagate(*(_own(value) for value in example))
    if fixed:  # by which fx gives its inputs other names
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        for node, name in zip(inputs, inspect.signature(model.forward).parameters, strict=False):
            node.target = name
    _follow_in_place(model, graph)
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    return Traced(graph, {name: why for name, why in whole.items() if name in called})


def _fixed_inputs(model: nn.Module, example: tuple[Any, ...]) -> dict[str, Any] | None:
    """Return the inputs by name that are no tensors in this call; None if all are."""
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    fixed: dict[str, Any] = {}
    for index, parameter in enumerate(inspect.signature(model.forward).parameters.values()):
        if parameter.kind not in named:
            continue
        value = example[index] if index < len(example) else parameter.default
        if value is None or isinstance(value, (bool, int, float, str)):
            fixed[parameter.name] = value
    return fixed or None


def _own(value: Any) -> Any:
    """Return what a network may write into."""
    return value.clone() if isinstance(value, Tensor) else value


def _trace_both(model: nn.Module, whole: Collection[str], fixed: dict[str, Any] | None) -> tuple[fx.Graph, set[str]]:
    graphs, mode_dependent = [], set()
    for training in (True, False):
        tracer = _Tracer(whole)
        with _mode(model, training=training):
            try:
                graphs.append(tracer.trace(model, concrete_args=fixed))
            except _FailedInError:
                raise
            except Exception as error:  # see above
                raise UntraceableError(f"{type(error).__name__}: {error}") from error
        mode_dependent |= tracer.mode_dependent
    if str(graphs[0]) != str(graphs[1]):
        raise UntraceableError(f"{type(model).__name__}.forward computes something else in training")
    return graphs[1], mode_dependent


def _follow_in_place(model: nn.Module, graph: fx.Graph) -> None:
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        seen.add(node)
        changed = node.args[0] if node.args else next(iter(node.all_input_nodes), None)
        if isinstance(changed, fx.Node) and _is_in_place(model, node):
            for reader in [reader for reader in changed.users if reader not in seen]:
                reader.replace_input_with(changed, node)


def _is_in_place(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return getattr(model.get_submodule(str(node.target)), "inplace", False) is True
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", "") == "_operator":
        return name in _IN_PLACE_OPERATORS
    return node.kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__"))


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


def graph_in_evaluation(module: nn.Module) -> fx.Graph | None:
    """Return the graph of a module that tells training from evaluation, in evaluation; None of any other.

    None, too, if it cannot be traced.
    """
    code = getattr(type(module).forward, "__code__", None)
    if code is None or "training" not in code.co_names:
        return None
    with _mode(module, training=False):
        try:
            return _Tracer().trace(module)
        except Exception:  # somebody else's forward may fail in any way on a proxy
            return None


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training
