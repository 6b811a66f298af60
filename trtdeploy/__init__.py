"""From a trained PyTorch network to a verified INT8 service on NVIDIA's stack.

Names are imported where they are first used, so that ``import trtdeploy`` stays fast and needs no runtime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trtdeploy import errors
from trtdeploy.errors import TrtDeployError
from trtdeploy.version import __version__

if TYPE_CHECKING:
    from trtdeploy.building.build import BuildConfig, build
    from trtdeploy.data.preprocessing import Preprocessing
    from trtdeploy.engine import Engine
    from trtdeploy.ledger import Ledger
    from trtdeploy.tensors import ShapeRange, TensorSpec

__all__ = [
    "BuildConfig",
    "Engine",
    "Ledger",
    "Preprocessing",
    "ShapeRange",
    "TensorSpec",
    "TrtDeployError",
    "__version__",
    "build",
    "errors",
]

_HOMES = {
    "BuildConfig": "trtdeploy.building.build",
    "Engine": "trtdeploy.engine",
    "Ledger": "trtdeploy.ledger",
    "Preprocessing": "trtdeploy.data.preprocessing",
    "ShapeRange": "trtdeploy.tensors",
    "TensorSpec": "trtdeploy.tensors",
    "build": "trtdeploy.building.build",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trtdeploy' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
