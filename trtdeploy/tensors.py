"""Names, data types and shapes of tensors, in numpy's, ONNX's and Triton's words."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from trtdeploy.errors import DtypeError, InputNameError, ShapeError, UsageError

Array = NDArray[Any]
DYNAMIC = -1
"""Stands in a shape for a dimension whose size is known only at run time."""

# numpy name -> (onnx.TensorProto.DataType, Triton's name)
_DTYPES: dict[str, tuple[int, str]] = {
    "float32": (1, "FP32"),
    "uint8": (2, "UINT8"),
    "int8": (3, "INT8"),
    "int32": (6, "INT32"),
    "int64": (7, "INT64"),
    "bool": (9, "BOOL"),
    "float16": (10, "FP16"),
    "float64": (11, "FP64"),
}
_FROM_ONNX = {code: name for name, (code, _) in _DTYPES.items()}
BYTES = "bytes"
"""Elements of any length, as Triton's BYTES; an array of them is one of objects. No engine takes them."""
_FROM_TRITON = {triton: name for name, (_, triton) in _DTYPES.items()} | {"BYTES": BYTES}


def dtype_from_onnx(code: int) -> str:
    """Return numpy's name of an ``onnx.TensorProto.DataType``; raise ``DtypeError`` for one that is not supported."""
    try:
        return _FROM_ONNX[code]
    except KeyError:
        raise DtypeError(f"ONNX tensor type {code} is not supported; supported: {sorted(_DTYPES)}.") from None


def dtype_to_triton(name: str) -> str:
    """Return Triton's name ("FP32") of a numpy data type ("float32")."""
    try:
        return _DTYPES[name][1]
    except KeyError:
        raise DtypeError(f"Data type {name} cannot be served; supported: {sorted(_DTYPES)}.") from None


def dtype_from_triton(name: str) -> str:
    """Return numpy's name of a Triton data type."""
    try:
        return _FROM_TRITON[name]
    except KeyError:
        raise DtypeError(f"Triton data type {name} is not supported; supported: {sorted(_FROM_TRITON)}.") from None


def _known_dtype(name: str) -> str:
    if name not in _DTYPES and name != BYTES:
        raise ValueError(f"unknown dtype {name!r}; known: {sorted(_DTYPES)}")
    return name


class TensorSpec(BaseModel):
    """An input or output of a model: name, numpy data type and shape with -1 where the size is dynamic."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dtype: Annotated[str, AfterValidator(_known_dtype)]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{format_shape(self.shape)}"


class _Range(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    _SMALLEST: ClassVar[int | None] = None

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    @model_validator(mode="after")
    def _ordered(self) -> _Range:
        if not len(self.min) == len(self.opt) == len(self.max):
            raise ValueError(f"min, opt and max must have the same rank, got {self.min}, {self.opt}, {self.max}")
        smallest = self._SMALLEST
        for low, best, high in zip(self.min, self.opt, self.max, strict=True):
            if not low <= best <= high or (smallest is not None and low < smallest):
                wanted = "min <= opt <= max" if smallest is None else f"{smallest} <= min <= opt <= max"
                raise ValueError(f"every dimension needs {wanted}, got {self}")
        return self

    def __str__(self) -> str:
        return ":".join("x".join(map(str, sizes)) for sizes in (self.min, self.opt, self.max))

    def contains(self, sizes: Sequence[int]) -> bool:
        """Say whether a shape, or the values of one, lies inside the range."""
        return len(sizes) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, sizes, self.max, strict=True)
        )


class ShapeRange(_Range):
    """The shapes that an optimization profile covers for one input: smallest, best served and largest."""

    _SMALLEST: ClassVar[int | None] = 1

    def fits(self, accepted: Sequence[int]) -> bool:
        """Say whether the range suits an input of this shape: its rank, and its size wherever that is not dynamic."""
        return len(accepted) == len(self.min) and all(
            size < 0 or low == high == size for size, low, high in zip(accepted, self.min, self.max, strict=True)
        )


class ValueRange(_Range):
    """The values that an optimization profile covers for one shape tensor: smallest, best served and largest.

    A shape tensor is an input that holds a shape, the second one of a Reshape for example.
    """


Profile = Mapping[str, ShapeRange]
"""One optimization profile: a range of shapes for each input, by name."""
ProfileValues = Mapping[str, ValueRange]
"""What one optimization profile covers of the shape tensors: a range of values for each, by name."""


def parse_shape_option(text: str) -> tuple[str, ShapeRange]:
    """Parse ``NAME=1x3x224x224`` or ``NAME=MIN:OPT:MAX`` as the ``--shape`` option takes it.

    Raises:
        UsageError: The text has another form, or min, opt and max are not in order.
    """
    name, separator, shapes_text = text.rpartition("=")
    shapes = [_parse_dims(part) for part in shapes_text.split(":")]
    if not separator or not name or len(shapes) not in (1, 3) or any(shape is None for shape in shapes):
        raise UsageError(
            f"--shape {text!r} is not NAME=DIMS or NAME=MIN:OPT:MAX.",
            hint="Example: --shape input=1x3x224x224:8x3x224x224:32x3x224x224",
        )
    low, best, high = shapes if len(shapes) == 3 else shapes * 3
    try:
        return name, ShapeRange.model_validate({"min": low, "opt": best, "max": high})
    except ValidationError as error:
        reasons = "; ".join(str(detail["msg"]).removeprefix("Value error, ") for detail in error.errors())
        raise UsageError(f"--shape {text!r}: {reasons}.") from error


def split_assignment(text: str, names: Collection[str]) -> tuple[str, str]:
    """Return both sides of ``NAME=VALUE``; either may hold more signs of equality.

    The longest of ``names`` that the text begins with is the left side; where it begins with none, what is before the
    last sign. Empty strings where there is none.
    """
    splits = [(text[:place], text[place + 1 :]) for place, sign in enumerate(text) if sign == "="]
    known = [split for split in splits if split[0] in names]
    return (known or splits or [("", "")])[-1]


def _parse_dims(text: str) -> tuple[int, ...] | None:
    if not re.fullmatch(r"[0-9]{1,18}(x[0-9]{1,18})*", text):
        return None
    return tuple(int(part) for part in text.split("x"))


def format_shape(shape: Sequence[int]) -> str:
    """Return ``[?, 3, 224, 224]`` for ``(-1, 3, 224, 224)``."""
    return "[" + ", ".join("?" if size == DYNAMIC else str(size) for size in shape) + "]"


def check_inputs(
    arrays: Mapping[str, Array],
    specs: Sequence[TensorSpec],
    profiles: Sequence[Profile] = (),
    profile_values: Sequence[ProfileValues] = (),
) -> dict[str, Array]:
    """Check arrays against what an engine accepts, before anything runs.

    Args:
        arrays: Input arrays by name.
        specs: The engine's inputs.
        profiles: Shape ranges; where there are any, the inputs together must lie inside one of them.
        profile_values: The same profiles' ranges of the values of shape tensors.

    Returns:
        The same arrays in the order of ``specs``, C-contiguous.

    Raises:
        InputNameError: A name is missing or unknown.
        DtypeError: A data type differs; nothing is converted silently.
        ShapeError: A rank or size differs from the spec, or no profile covers the shapes and values.
    """
    accepted = {spec.name for spec in specs}
    unknown = sorted(set(arrays) - accepted)
    missing = sorted(accepted - set(arrays))
    if unknown or missing:
        given = sorted(arrays)
        raise InputNameError(f"Inputs {given} were given; this engine takes {sorted(accepted)}.")
    checked: dict[str, Array] = {}
    for spec in specs:
        array = arrays[spec.name]
        if array.dtype != np.dtype(spec.dtype):
            raise DtypeError(
                f"Input {spec.name!r} has dtype {array.dtype}; this engine takes {spec.dtype}.",
                hint=f'Convert it: array.astype("{spec.dtype}").',
            )
        if not _matches(array.shape, spec.shape):
            raise ShapeError(
                f"Input {spec.name!r} has shape {list(array.shape)}; this engine takes {format_shape(spec.shape)}."
            )
        if 0 in array.shape:
            raise ShapeError(
                f"Input {spec.name!r} has shape {list(array.shape)}, which is empty; every size must be at least 1."
            )
        # ascontiguousarray would give a scalar one dimension; a device array is contiguous already
        checked[spec.name] = np.asarray(array, order="C") if isinstance(array, np.ndarray) else array
    nothing: dict[str, Any] = {}
    both = list(zip_longest(profiles, profile_values, fillvalue=nothing))
    if both and not any(covers(profile, values, checked) for profile, values in both):
        raise _outside(checked, both)
    return checked


def covers(profile: Profile, values: ProfileValues, arrays: Mapping[str, Array]) -> bool:
    """Say whether a profile covers inputs: the shapes of all that it names, and the values of shape tensors."""
    return all(shapes.contains(arrays[name].shape) for name, shapes in profile.items() if name in arrays) and all(
        # on a device they cannot be looked at here, and TensorRT takes no shape from there
        held.contains(_values(arrays[name]))
        for name, held in values.items()
        if _is_on_host(arrays.get(name))
    )


def _outside(arrays: Mapping[str, Array], profiles: Sequence[tuple[Profile, ProfileValues]]) -> ShapeError:
    held = {name for _, values in profiles for name in values if _is_on_host(arrays.get(name))}
    shapes = [f"{name}={list(array.shape)}" for name, array in arrays.items() if name not in held]
    given = [f"shapes {', '.join(shapes)}"] if shapes else []
    if held:
        given.append("values " + ", ".join(f"{name}={list(_values(arrays[name]))}" for name in arrays if name in held))
    text = " and ".join(given)
    ranges = "; ".join(
        ", ".join(f"{name}={covered}" for name, covered in {**profile, **values}.items())
        for profile, values in profiles
    )
    return ShapeError(
        f"{text[0].upper()}{text[1:]} lie in no profile of this plan, which covers {ranges}.",
        hint="Rebuild the plan with a --shape that includes them, or split the batch.",
    )


def _values(array: Array) -> tuple[int, ...]:
    return tuple(int(value) for value in array.ravel())


def _is_on_host(array: Any) -> bool:
    return isinstance(array, np.ndarray)


def _matches(shape: Sequence[int], accepted: Sequence[int]) -> bool:
    return len(shape) == len(accepted) and all(
        want in (DYNAMIC, size) for size, want in zip(shape, accepted, strict=True)
    )


def random_inputs(
    specs: Sequence[TensorSpec],
    shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    values: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> dict[str, Array]:
    """Return reproducible inputs: standard normal floats, as normalised images are; integers 0 or 1, valid as indices.

    Args:
        specs: The inputs.
        shapes: Shape by name; where there is none, dynamic dimensions are 1.
        values: What shape tensors hold, by name: no random number would be a shape.
        seed: Of the generator.
    """
    rng = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for spec in specs:
        shape = (shapes or {}).get(spec.name) or [1 if size == DYNAMIC else size for size in spec.shape]
        kind = np.dtype(spec.dtype)
        if values and spec.name in values:
            inputs[spec.name] = np.array(values[spec.name], kind).reshape(shape)
            continue
        drawn: Array = rng.standard_normal(shape) if np.issubdtype(kind, np.floating) else rng.integers(0, 2, shape)
        inputs[spec.name] = drawn.astype(kind)
    return inputs
