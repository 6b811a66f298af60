"""The inputs that a build checks and measures a model on: real ones as far as they are given, drawn ones otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from trtdeploy.errors import UsageError
from trtdeploy.onnxgraph.input_meaning import Meaning, input_meanings
from trtdeploy.tensors import DYNAMIC, Array, ShapeRange, TensorSpec, random_inputs

_NO_NAMES = frozenset({"", "?"})
"""PaddlePaddle's exporter gives every open size the name "?", so that it says nothing."""


@dataclass(frozen=True)
class RealInputs:
    """Inputs that the user gives for a build.

    Attributes:
        arrays: What the model is checked and measured on, by input; an input may be missing.
        ranges: The shapes of all the samples, by input: smallest, measured and largest.
        origin: Where they come from, for the manifest.
    """

    arrays: Mapping[str, Array]
    ranges: Mapping[str, ShapeRange]
    origin: str


@dataclass(frozen=True)
class TrialInputs:
    """Inputs on which a model is checked and measured.

    Attributes:
        arrays: Every input, by name.
        assumed: Inputs with open sizes beside the batch that nothing tells, which are 1 here.
        origin: Where the values come from.
    """

    arrays: dict[str, Array]
    assumed: tuple[TensorSpec, ...]
    origin: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every input."""
        return {name: tuple(array.shape) for name, array in self.arrays.items()}

    @property
    def remedy(self) -> str:
        """What to give in place of what was assumed."""
        given = " ".join(f"--shape {spec.name}={_example(spec)}" for spec in self.assumed)
        sizes = f"the sizes that it is served with ({given}, with numbers for the letters), or " if given else ""
        return f"Give {sizes}real inputs: --data SAMPLES (.npy or .npz files)"

    def __str__(self) -> str:
        return ", ".join(f"{name}={'x'.join(map(str, shape)) or 'one value'}" for name, shape in self.shapes.items())


def trial_inputs(
    model: onnx.ModelProto,
    specs: Sequence[TensorSpec],
    shapes: Mapping[str, Sequence[int]],
    real: RealInputs | None = None,
    *,
    seed: int = 0,
) -> TrialInputs:
    """Return real inputs where they are given; drawn ones of the right meaning and shape for the others.

    Args:
        model: The model, whose graph says what integers mean.
        specs: Its inputs.
        shapes: Wanted shapes, by input; an open size that has the same name as one of these is equal to it, any other
            is 1.
        real: What the user gives.
        seed: Of the generator.

    Raises:
        UsageError: The values of an input decide what is computed, and none is given.
    """
    given = dict(real.arrays) if real else {}
    known = {**shapes, **{name: array.shape for name, array in given.items()}}
    sizes, assumed = _sizes(model, specs, known)
    drawn = [spec for spec in specs if spec.name not in given]
    meanings = input_meanings(model)
    for spec in drawn:
        reason = meanings.get(spec.name, Meaning()).decides
        if reason and not _has_one_meaning(meanings[spec.name]):
            raise UsageError(
                f"No drawn number is right for the input {spec}: {reason}.",
                hint=f"Give what it is served with, --fixed {spec.name}=VALUE, or real inputs: --data SAMPLES",
            )
    arrays = random_inputs(drawn, sizes, seed=seed)
    rng = np.random.default_rng(seed)
    for spec in drawn:
        arrays[spec.name] = _meant(meanings.get(spec.name, Meaning()), arrays[spec.name], rng)
    origin = "random numbers" if drawn else ""
    if given and real is not None:
        origin = real.origin + (f", random numbers for {', '.join(spec.name for spec in drawn)}" if drawn else "")
    everything = {**arrays, **given}
    return TrialInputs({spec.name: everything[spec.name] for spec in specs}, assumed, origin)


def _names(model: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """Return the names of the sizes of every input; an empty one for a size without a name."""
    return {value.name: tuple(dim.dim_param for dim in value.type.tensor_type.shape.dim) for value in model.graph.input}


def _sizes(
    model: onnx.ModelProto, specs: Sequence[TensorSpec], given: Mapping[str, Sequence[int]]
) -> tuple[dict[str, tuple[int, ...]], tuple[TensorSpec, ...]]:
    """Return a shape for every input, and the inputs where more than the batch was taken as 1."""
    names = _names(model)
    known: dict[str, int] = {}
    for name, shape in given.items():
        known.update(zip(names.get(name, ()), shape, strict=False))
    batch = {axes[0] for axes in names.values() if axes}
    shapes: dict[str, tuple[int, ...]] = {}
    assumed: list[TensorSpec] = []
    for spec in specs:
        if spec.name in given:
            shapes[spec.name] = tuple(given[spec.name])
            continue
        named = [name if name not in _NO_NAMES else None for name in names[spec.name]]
        open_ones = [axis for axis, size in enumerate(spec.shape) if size == DYNAMIC and named[axis] not in known]
        shapes[spec.name] = tuple(
            1 if axis in open_ones else known[named[axis] or ""] if size == DYNAMIC else size
            for axis, size in enumerate(spec.shape)
        )
        if any(axis and (named[axis] is None or named[axis] not in batch) for axis in open_ones):
            assumed.append(spec)
    return shapes, tuple(assumed)


def _has_one_meaning(meaning: Meaning) -> bool:
    return meaning.below is not None or meaning.among is not None


def _meant(meaning: Meaning, drawn: Array, rng: np.random.Generator) -> Array:
    kind = drawn.dtype
    if meaning.below is not None:
        return rng.integers(0, max(meaning.below, 1), drawn.shape).astype(kind)
    if meaning.among is not None:
        return rng.choice(meaning.among, drawn.shape).astype(kind)
    if meaning.is_mask:
        return np.ones_like(drawn)
    if kind in (np.uint8, np.int8):  # pixels, or codes
        limits = np.iinfo(kind)
        return rng.integers(limits.min, limits.max, drawn.shape, kind, endpoint=True)
    return drawn


def _example(spec: TensorSpec) -> str:
    letters = iter("abcdefghijklmnop")
    return "x".join(
        "1" if size == DYNAMIC and not axis else next(letters) if size == DYNAMIC else str(size)
        for axis, size in enumerate(spec.shape)
    )
