"""Finding the TensorRT library of this environment."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from trtdeploy.errors import RuntimeUnavailableError

if TYPE_CHECKING:
    from trtdeploy.runtimes.tensorrt.messages import Messages

FlavourName = Literal["tensorrt", "tensorrt-rtx"]
_OLDEST = (10, 3)


@dataclass(frozen=True)
class Flavour:
    """One of the two libraries with this API.

    Attributes:
        name: As ``--runtime`` and the manifest call it.
        module: Its Python module.
        title: As people call it.
        builds_without_gpu: Whether its builder runs where there is no GPU.
    """

    name: FlavourName
    module: str
    title: str
    builds_without_gpu: bool


FLAVOURS: dict[str, Flavour] = {
    "tensorrt": Flavour("tensorrt", "tensorrt", "TensorRT", builds_without_gpu=False),
    "tensorrt-rtx": Flavour("tensorrt-rtx", "tensorrt_rtx", "TensorRT-RTX", builds_without_gpu=True),
}


@dataclass(frozen=True)
class Bindings:
    """An imported library.

    Attributes:
        flavour: Which one.
        trt: Its module.
        version: Exact version, "10.16.1.11".
        messages: Where its log goes.
    """

    flavour: Flavour
    trt: ModuleType
    version: str
    messages: Messages

    @property
    def release(self) -> tuple[int, ...]:
        """The numbers of the version."""
        return tuple(int(part) for part in re.findall(r"\d+", self.version)[:4])


def load_bindings(name: str) -> Bindings:
    """Import a library.

    Raises:
        RuntimeUnavailableError: It is not installed, cannot be loaded, or is too old.
    """
    from trtdeploy.runtimes.tensorrt.messages import messages_of

    flavour = FLAVOURS[name]
    try:
        module = importlib.import_module(flavour.module)
    except ModuleNotFoundError as error:
        raise RuntimeUnavailableError(
            f"{flavour.title} is not installed: there is no Python module {error.name!r}.",
            hint=_how_to_install(flavour),
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeUnavailableError(
            f"{flavour.title} is installed but cannot be loaded: {error}.", hint=_how_to_install(flavour)
        ) from error
    version = str(getattr(module, "__version__", "unknown"))
    if not hasattr(module, "Builder") and not hasattr(module, "Runtime"):
        # a folder of this name without an __init__.py imports as an empty namespace
        raise RuntimeUnavailableError(
            f"The Python module {flavour.module} is not {flavour.title}: it has neither Builder nor Runtime.",
            hint=_how_to_install(flavour),
        )
    bindings = Bindings(flavour, module, version, messages_of(module))
    if name == "tensorrt" and bindings.release[:2] < _OLDEST:
        raise RuntimeUnavailableError(
            f"TensorRT {version} is installed; {'.'.join(map(str, _OLDEST))} or later is needed.",
            hint=_how_to_install(flavour),
        )
    return bindings


def _how_to_install(flavour: Flavour) -> str:
    extra = "tensorrt" if flavour.name == "tensorrt" else "rtx"
    return f"Install it: pip install 'trtdeploy[{extra}]'"
