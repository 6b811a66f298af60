"""The inputs and outputs of a TensorRT engine, read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trtdeploy.errors import PlanIncompatibleError
from trtdeploy.runtimes.tensorrt.bindings import Bindings
from trtdeploy.tensors import Array, ShapeRange

if TYPE_CHECKING:
    import tensorrt

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class EngineTensor:
    """One input or output.

    Attributes:
        name: Its name.
        dtype: Numpy's data type.
        is_input: Input or output.
        on_host: TensorRT reads or writes it in host memory: the values of a shape.
    """

    name: str
    dtype: np.dtype[np.generic]
    is_input: bool
    on_host: bool


def engine_tensors(bindings: Bindings, engine: tensorrt.ICudaEngine) -> tuple[EngineTensor, ...]:
    """Read the engine's inputs and outputs.

    Raises:
        PlanIncompatibleError: One has a data type that no numpy array can hold.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings.trt
    tensors = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = str(engine.get_tensor_dtype(name)).rpartition(".")[2]
        if kind not in _DTYPES:
            raise PlanIncompatibleError(
                f"The plan's tensor {name} has type {kind}; supported are {', '.join(_DTYPES)}.",
                hint="Cast it to one of these inside of the model.",
            )
        tensors.append(
            EngineTensor(
                name=name,
                dtype=np.dtype(_DTYPES[kind]),
                is_input=engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                on_host=engine.get_tensor_location(name) == trt.TensorLocation.HOST,
            )
        )
    return tuple(tensors)


def engine_profiles(engine: tensorrt.ICudaEngine, tensors: Sequence[EngineTensor]) -> tuple[dict[str, ShapeRange], ...]:
    """Return what each profile covers, for the inputs whose shapes (not values) it limits."""
    profiles = []
    for index in range(engine.num_optimization_profiles):
        ranges = {}
        for tensor in tensors:
            if tensor.is_input and not tensor.on_host:
                low, best, high = (
                    tuple(map(int, dims)) for dims in engine.get_tensor_profile_shape(tensor.name, index)
                )
                # an empty shape of a scalar has nothing to limit
                if low and min(low) >= 1:
                    ranges[tensor.name] = ShapeRange(min=low, opt=best, max=high)
        profiles.append(ranges)
    return tuple(profiles)


def choose_profile(profiles: Sequence[dict[str, ShapeRange]], arrays: dict[str, Array], current: int) -> int:
    """Return the profile to run in: the current one if it covers the shapes, else the one served best.

    Switching costs, so a profile that fits is kept. Among others the one whose opt shapes are nearest counts (sum of
    the relative distances of all sizes). If none covers them, the current one: TensorRT then says what is wrong.
    """
    fitting = [index for index, profile in enumerate(profiles) if _covers(profile, arrays)]
    if not fitting or current in fitting:
        return current
    return min(fitting, key=lambda index: _distance(profiles[index], arrays))


def _covers(profile: dict[str, ShapeRange], arrays: dict[str, Array]) -> bool:
    return all(shapes.contains(arrays[name].shape) for name, shapes in profile.items() if name in arrays)


def _distance(profile: dict[str, ShapeRange], arrays: dict[str, Array]) -> float:
    return sum(
        abs(size - best) / best
        for name, shapes in profile.items()
        if name in arrays
        for size, best in zip(arrays[name].shape, shapes.opt, strict=True)
    )
