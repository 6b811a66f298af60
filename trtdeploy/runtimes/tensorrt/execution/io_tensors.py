"""The inputs and outputs of a TensorRT engine, read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trtdeploy.errors import PlanIncompatibleError
from trtdeploy.runtimes.tensorrt.bindings import Bindings
from trtdeploy.tensors import Array, ShapeRange, ValueRange, covers

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


@dataclass(frozen=True)
class EngineProfile:
    """What one optimization profile covers.

    Attributes:
        shapes: By input, for those whose shapes it limits.
        values: By input, for those that hold a shape.
    """

    shapes: dict[str, ShapeRange]
    values: dict[str, ValueRange]


def engine_tensors(bindings: Bindings, engine: tensorrt.ICudaEngine) -> tuple[EngineTensor, ...]:
    """Read the engine's inputs and outputs.

    Raises:
        PlanIncompatibleError: One has a data type that no numpy array can hold, or a format that is not linear.
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
        for profile in range(engine.num_optimization_profiles):
            # a vectorized one is padded: its buffer is larger than its shape says
            if engine.get_tensor_format(name, profile) != trt.TensorFormat.LINEAR:
                raise PlanIncompatibleError(
                    f"The plan's tensor {name} has another format than linear: "
                    f"{engine.get_tensor_format_desc(name, profile)}.",
                    hint="Build it again without one: trtexec without --inputIOFormats and --outputIOFormats.",
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


def engine_profiles(engine: tensorrt.ICudaEngine, tensors: Sequence[EngineTensor]) -> tuple[EngineProfile, ...]:
    """Return what each profile covers."""
    profiles = []
    inputs = [tensor for tensor in tensors if tensor.is_input]
    for index in range(engine.num_optimization_profiles):
        shapes, values = {}, {}
        for tensor in inputs:
            if tensor.on_host:
                # the bindings take the number first, whatever they call their arguments (TensorRT, pyCore.cpp)
                held = engine.get_tensor_profile_values(index, tensor.name)
                if held:
                    low, best, high = map(tuple, held)
                    values[tensor.name] = ValueRange(min=low, opt=best, max=high)
                continue
            low, best, high = (tuple(map(int, dims)) for dims in engine.get_tensor_profile_shape(tensor.name, index))
            # an empty shape of a scalar has nothing to limit
            if low and min(low) >= 1:
                shapes[tensor.name] = ShapeRange(min=low, opt=best, max=high)
        profiles.append(EngineProfile(shapes, values))
    return tuple(profiles)


def choose_profile(profiles: Sequence[EngineProfile], arrays: Mapping[str, Array], current: int) -> int:
    """Return the profile to run in: the current one if it covers the inputs, else the one served best.

    Switching costs, so a profile that fits is kept. Among others the one whose opt shapes and values are nearest counts
    (sum of the relative distances of all sizes). If none covers them, the current one: TensorRT says what is wrong.
    """
    fitting = [index for index, profile in enumerate(profiles) if covers(profile.shapes, profile.values, arrays)]
    if not fitting or current in fitting:
        return current
    return min(fitting, key=lambda index: _distance(profiles[index], arrays))


def _distance(profile: EngineProfile, arrays: Mapping[str, Array]) -> float:
    pairs = [(arrays[name].shape, shapes.opt) for name, shapes in profile.shapes.items()]
    pairs += [(arrays[name].ravel().tolist(), held.opt) for name, held in profile.values.items()]
    total = 0.0
    for sizes, opt in pairs:
        total += sum(abs(size - best) / max(1, abs(best)) for size, best in zip(sizes, opt, strict=True))
    return total
