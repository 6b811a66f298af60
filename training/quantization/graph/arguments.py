"""The inputs of any network, as it is called with them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from trtdeploy.errors import UsageError

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""One tensor, several by position, or several by name."""


def as_arguments(model: nn.Module, inputs: Inputs, *, device: torch.device | None = None) -> tuple[Any, ...]:
    """Return inputs by position, as ``model(*arguments)`` takes them; what lies between named ones has its default.

    Args:
        model: Whose forward names its inputs.
        inputs: See ``Inputs``.
        device: Where tensors are moved; where they are if None.

    Raises:
        UsageError: The forward has no input of a name, or lacks one.
    """
    if isinstance(inputs, Mapping):
        arguments = _by_position(model, inputs)
    else:
        arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        _bound(model, *arguments)
    if device is None:
        return arguments
    moved: tuple[Any, ...] = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, arguments)
    return moved


def input_names(model: nn.Module, arguments: tuple[Any, ...]) -> list[str]:
    """Return the names of the tensors among the arguments, as the forward calls them."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    names: list[str] = []
    for index, argument in enumerate(arguments):
        last = parameters[min(index, len(parameters) - 1)] if parameters else None
        named = last is not None and last.kind is not inspect.Parameter.VAR_POSITIONAL
        name = last.name if last is not None and named else f"input_{index}"
        count = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(argument))
        names += [name] if count == 1 else [f"{name}_{each}" for each in range(count)]
    return names


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside what ``torch.compile`` and ``DistributedDataParallel`` put around it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of what a network takes or returns, in the order in which they are exported."""
    yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _by_position(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    given, signature = _bound(model, **inputs), inspect.signature(model.forward)
    arguments: list[Any] = []
    for name, parameter in signature.parameters.items():
        if not any(each in given for each in list(signature.parameters)[len(arguments) :]):
            break
        if parameter.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
            raise UsageError(
                f"{type(model).__name__}.forward takes {name} by name alone; inputs are passed by position.",
                hint="Wrap the network in a module whose forward takes its tensors by position.",
            )
        arguments.append(given.get(name, parameter.default))
    return tuple(arguments)


def _bound(model: nn.Module, *arguments: Any, **named: Any) -> Mapping[str, Any]:
    """Return what a call gives, by the names of the forward's inputs."""
    signature = inspect.signature(model.forward)
    try:
        return signature.bind(*arguments, **named).arguments
    except TypeError as error:
        raise UsageError(
            f"{type(model).__name__}.forward does not take these inputs: {error}.",
            hint=f"It takes {', '.join(signature.parameters)}; give several as a tuple or, by name, as a dictionary.",
        ) from error
