"""Plugins: TensorRT's own, and libraries that a caller trusts."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trtdeploy.errors import UsageError
from trtdeploy.runtimes.tensorrt.bindings import Bindings


def load_plugins(bindings: Bindings, paths: Sequence[Path]) -> None:
    """Register TensorRT's standard plugins, and load libraries, whose constructors register theirs.

    This comes before a model is parsed or a plan is deserialized that refers to them.

    Raises:
        UsageError: A library cannot be loaded.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings.trt
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(bindings.messages.logger, "")
    for path in paths:
        try:
            ctypes.CDLL(str(path.resolve(strict=True)))
        except OSError as error:
            raise UsageError(f"The plugin library {path} cannot be loaded: {error}.") from error
