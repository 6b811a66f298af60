"""Importing TensorRT or TensorRT-RTX and making a builder, in the process that ``probe`` has to itself."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

_CUDA_MAJORS = range(11, 20)


def probe_bindings(module_name: str) -> dict[str, Any]:
    """Look at one of the two.

    Raises:
        ImportError: It is not installed, its libraries are missing, or the module is something else.
    """
    module = importlib.import_module(module_name)
    if not hasattr(module, "Builder") or not hasattr(module, "Logger"):
        raise ImportError(f"the module {module_name} has no Builder and no Logger: it is something else of that name")
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = module
    builder_error = ""
    try:
        trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    except (RuntimeError, TypeError) as error:
        builder_error = str(error).partition("\n")[0]
    return {
        "version": str(getattr(module, "__version__", "unknown")),
        "cuda": _built_for(module_name.replace("_", "-")),
        "builder_error": builder_error,
    }


def _built_for(distribution: str) -> str | None:
    """Return the major version of CUDA, which is in the name of the wheels."""
    for major in _CUDA_MAJORS:
        for name in (f"{distribution}-cu{major}-bindings", f"{distribution}-cu{major}"):
            try:
                metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
            return str(major)
    return None
