"""Network definitions, and finding the one that a name means."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

from trtdeploy.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

DEFAULT_MODEL = "efficientnet_b0"
BUILT_IN = {"efficientnet_b0": "training.models.efficientnet:efficientnet_b0"}


def create_model(name: str, *, num_classes: int) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        name: ``efficientnet_b0``, or ``module:factory`` where ``factory(num_classes)`` returns a ``torch.nn.Module``
            that maps ``(N, C, H, W)`` float images to ``(N, num_classes)`` logits. The current folder is searched too.
        num_classes: Width of the output.

    Raises:
        UsageError: The name means nothing here; the message says what was tried.
    """
    from torch import nn

    with _current_folder_importable():
        factory = _resolve(name)
        try:
            model = factory(num_classes)
        except Exception as error:  # a user's factory may fail in any way
            raise UsageError(
                f"--model {name}: calling it with num_classes={num_classes} failed: {type(error).__name__}: {error}.",
                hint="The factory is called as factory(num_classes) and returns the network.",
            ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"--model {name} returned {type(model).__name__}; expected a torch.nn.Module.",
            hint="The factory is called as factory(num_classes) and returns the network.",
        )
    return model


def _resolve(name: str) -> Callable[[int], object]:
    module_name, separator, factory_name = BUILT_IN.get(name, name).partition(":")
    if not separator or not module_name or not factory_name:
        raise UsageError(
            f"--model {name!r} is no model: it is neither one of {', '.join(BUILT_IN)} nor of the form module:factory.",
            hint="Example: --model my_networks.resnet:resnet18",
        )
    try:
        module = import_module(module_name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        raise UsageError(
            f"--model {name}: importing {module_name!r} failed: {type(error).__name__}: {error}.",
            hint=f"Searched the installed packages and {os.getcwd()}.",
        ) from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise UsageError(f"--model {name}: {module_name} has no function {factory_name!r}.")
    found: Callable[[int], object] = factory
    return found


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """Search the current folder last, as ``python -m`` does first; an installed command does not search it at all."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
