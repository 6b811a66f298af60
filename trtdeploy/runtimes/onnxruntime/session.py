"""Making inference sessions, and turning ONNX Runtime's exceptions into ours."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _native
from pydantic import ValidationError

from trtdeploy.errors import DtypeError
from trtdeploy.tensors import TensorSpec

Session = Any  # onnxruntime ships no types

OPTIMIZE_ALL = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
OPTIMIZE_PORTABLE = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
OPTIMIZE_NOTHING = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
_FATAL_ONLY = 4  # what goes wrong is in the exception; a second copy on stderr helps nobody

RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    # NotImplemented, InvalidGraph, Fail, ...: they have no common base but Exception
    *(kind for kind in vars(_native).values() if isinstance(kind, type) and issubclass(kind, Exception)),
)
"""Everything that ONNX Runtime raises when it refuses or fails to run a model."""


def make_session(
    model: bytes | str,
    *,
    threads: int = 1,
    optimization: Any = OPTIMIZE_NOTHING,
    entries: Mapping[str, str] | None = None,
    save_optimized: Path | None = None,
    without: Sequence[str] = (),
) -> Session:
    """Load a model for the CPU.

    Args:
        model: Serialized ONNX, or the path of a file.
        threads: Threads of one inference.
        optimization: One of the ``OPTIMIZE_`` levels.
        entries: Session configuration entries by name.
        save_optimized: Where to write the optimized graph.
        without: Optimizations, by ONNX Runtime's name, that are not applied; one that it does not have is no error.

    Raises:
        RUNTIME_ERRORS: ONNX Runtime refuses the model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = optimization
    options.log_severity_level = _FATAL_ONLY
    # Threads that spin while they wait take the processor from every other context and process on the machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, value in (entries or {}).items():
        options.add_session_config_entry(name, value)
    if save_optimized is not None:
        options.optimized_model_filepath = str(save_optimized)
    return onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without)
    )


def optimize_offline(
    model: bytes, *, optimization: Any, entries: Mapping[str, str], without: Sequence[str] = ()
) -> bytes:
    """Return the graph that ONNX Runtime makes of ``model``, serialized."""
    with tempfile.TemporaryDirectory(prefix="trtdeploy-build-") as folder:
        target = Path(folder) / "optimized.onnx"
        make_session(model, optimization=optimization, entries=entries, save_optimized=target, without=without)
        return target.read_bytes()


def tensor_spec(value: Any) -> TensorSpec:
    """Return what a session says of an input or output: "tensor(float)" and sizes that may be names.

    Raises:
        DtypeError: It has another element type than arrays have here.
    """
    kind = str(value.type).removeprefix("tensor(").removesuffix(")")
    dtype = {"float": "float32", "double": "float64"}.get(kind, kind)
    shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
    try:
        return TensorSpec(name=value.name, dtype=dtype, shape=shape)
    except ValidationError as error:
        raise DtypeError(f"{value.name!r} is {value.type}, which no array of numpy holds.") from error


def first_line(error: Exception) -> str:
    """Return the part of ONNX Runtime's message that says what is wrong."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    # "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find ..."
    return text.split(" : ", 3)[-1]
