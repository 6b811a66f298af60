"""Optimization profiles: from the config, or by default from the model; checked, as TensorRT hardly does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trtdeploy.errors import UsageError
from trtdeploy.runtimes.config import BuildConfig
from trtdeploy.tensors import ShapeRange, ValueRange, format_shape

if TYPE_CHECKING:
    import tensorrt

    from trtdeploy.runtimes.trial_inputs import RealInputs

_DEFAULT_BATCHES = (1, 8, 32)

Profiles = tuple[dict[str, ShapeRange], ...]


def profiles_for(network: tensorrt.INetworkDefinition, config: BuildConfig, real: RealInputs | None = None) -> Profiles:
    """Return the profiles to build with; each has a range for every input that needs one.

    Where the config has none, real inputs tell: the shapes of all samples, and what shape tensors hold.

    Raises:
        UsageError: A name is unknown, a range does not fit its input, or a dynamic input has no range.
    """
    inputs = _inputs(network)
    for profile in config.profiles:
        for name, shapes in profile.items():
            _check_range(name, shapes, inputs)
    needing = {name: tensor for name, tensor in inputs.items() if tensor.is_shape_tensor or _is_dynamic(tensor)}
    if not needing:
        return config.profiles
    if not config.profiles:
        return ({name: _real_range(tensor, real) or _default_range(name, tensor) for name, tensor in needing.items()},)
    for number, profile in enumerate(config.profiles):
        missing = sorted(set(needing) - set(profile))
        if missing:
            raise UsageError(
                f"Profile {number} has no range for {', '.join(missing)}, whose size is dynamic.",
                hint="Give each dynamic input a range: --shape NAME=MIN:OPT:MAX",
            )
    return config.profiles


def split_values(
    network: tensorrt.INetworkDefinition, profiles: Profiles
) -> tuple[Profiles, tuple[dict[str, ValueRange], ...]]:
    """Tell the ranges of shapes from those of the values of shape tensors; a config has both in one.

    Returns:
        The ranges of shapes, and of values, of each profile; no values at all if there are no shape tensors.
    """
    holding = {name for name, tensor in _inputs(network).items() if tensor.is_shape_tensor}
    shapes = tuple({name: r for name, r in profile.items() if name not in holding} for profile in profiles)
    values = tuple(
        {name: ValueRange(min=r.min, opt=r.opt, max=r.max) for name, r in profile.items() if name in holding}
        for profile in profiles
    )
    return shapes, values if any(values) else ()


def add_profiles(
    builder: tensorrt.Builder,
    network: tensorrt.INetworkDefinition,
    config: tensorrt.IBuilderConfig,
    profiles: Sequence[Mapping[str, ShapeRange]],
) -> None:
    """Give TensorRT the profiles.

    Raises:
        UsageError: TensorRT refuses one, which it says by an index of -1 only.
    """
    inputs = _inputs(network)
    for number, ranges in enumerate(profiles):
        profile = builder.create_optimization_profile()
        for name, shapes in ranges.items():
            if inputs[name].is_shape_tensor:
                profile.set_shape_input(name, shapes.min, shapes.opt, shapes.max)
            else:
                profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
        if config.add_optimization_profile(profile) < 0:
            shown = ", ".join(f"{name}={shapes}" for name, shapes in ranges.items())
            raise UsageError(f"TensorRT refuses profile {number}: {shown}.", hint="Look at its ranges and names.")


def _inputs(network: tensorrt.INetworkDefinition) -> dict[str, tensorrt.ITensor]:
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    return {tensor.name: tensor for tensor in tensors}


def _dims(tensor: tensorrt.ITensor) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor.shape)


def _is_dynamic(tensor: tensorrt.ITensor) -> bool:
    return any(size < 0 for size in _dims(tensor))


def _check_range(name: str, shapes: ShapeRange, inputs: Mapping[str, tensorrt.ITensor]) -> None:
    if name not in inputs:
        raise UsageError(f"--shape names input {name!r}; the model has {sorted(inputs)}.")
    tensor = inputs[name]
    wanted = _dims(tensor)
    if tensor.is_shape_tensor:
        count = math.prod(wanted)
        if len(shapes.min) != count:
            raise UsageError(
                f"--shape {name}={shapes} gives {len(shapes.min)} values; the model's input {name} holds the {count} "
                "of a shape.",
                hint="For such an input the numbers are what it holds, not its own size.",
            )
        return
    if not shapes.fits(wanted):
        raise UsageError(f"--shape {name}={shapes} does not fit the model's input {name} {format_shape(wanted)}.")


def _real_range(tensor: tensorrt.ITensor, real: RealInputs | None) -> ShapeRange | None:
    if real is None or tensor.name not in real.arrays:
        return None
    if not tensor.is_shape_tensor:
        return real.ranges[tensor.name]
    held = tuple(int(value) for value in real.arrays[tensor.name].ravel())
    return ShapeRange(min=held, opt=held, max=held)


def _default_range(name: str, tensor: tensorrt.ITensor) -> ShapeRange:
    shape = _dims(tensor)
    if tensor.is_shape_tensor:
        example = ":".join("x".join(f"{letter}{number}" for number in range(math.prod(shape))) for letter in "abc")
        raise UsageError(
            f"Input {name} {format_shape(shape)} holds a shape; no default can be right for its values.",
            hint=f"Give their range: --shape {name}={example} with numbers for the letters; or --fixed {name}=VALUES.",
        )
    if any(size < 0 for size in shape[1:]):
        example = ":".join("x".join(str(size) if size >= 0 else letter for size in shape) for letter in "abc")
        raise UsageError(
            f"Input {name} {format_shape(shape)} has more dynamic sizes than the batch; no default can be right.",
            hint=f"Give a range, --shape {name}={example or 'MIN:OPT:MAX'} with numbers for the letters, or real "
            "inputs whose sizes are taken: --data SAMPLES (.npy or .npz files)",
        )
    low, best, high = ((batch, *shape[1:]) for batch in _DEFAULT_BATCHES)
    return ShapeRange(min=low, opt=best, max=high)
