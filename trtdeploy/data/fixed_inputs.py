"""Inputs that every run of a model gets alike, as ``--fixed NAME=FILE|VALUE`` says: a threshold, a state, a rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trtdeploy.errors import DataError, UsageError
from trtdeploy.tensors import DYNAMIC, Array, TensorSpec, split_assignment

_WORDS = {"true": 1.0, "false": 0.0}


def parse_fixed(texts: Sequence[str], inputs: Sequence[TensorSpec], *, option: str = "--fixed") -> dict[str, Array]:
    """Return the arrays that ``NAME=FILE|VALUE`` name, by input.

    A FILE is a .npy file with the whole input. A VALUE is a number, ``true`` or ``false``, or several numbers with
    commas between them, that fill the input along its last axis; a size that the model leaves open is 1 then.

    Args:
        texts: As given.
        inputs: What the model takes.
        option: What messages call the option.

    Raises:
        UsageError: A text has another form, names no input or one twice, or a value does not fit the input.
        DataError: A file cannot be read, or does not hold what the model takes.
    """
    specs = {spec.name: spec for spec in inputs}
    fixed: dict[str, Array] = {}
    for text in texts:
        name, given = split_assignment(text, specs)
        takes = f"The model takes {', '.join(map(str, inputs))}."
        if not name or not given:
            raise UsageError(f"{option} {text!r} is not NAME=FILE.npy or NAME=VALUE.", hint=takes)
        if name not in specs:
            raise UsageError(f"{option} names input {name!r}, which the model does not have.", hint=takes)
        if name in fixed:
            raise UsageError(f"{option} names {name!r} twice; give each input once.")
        values = _numbers(given)
        what = f"{option} {text}"
        fixed[name] = _read(Path(given), specs[name], what) if values is None else _filled(values, specs[name], what)
    return fixed


def _numbers(text: str) -> list[float | int] | None:
    values: list[float | int] = []
    for part in text.split(","):
        word = part.strip().lower()
        try:
            values.append(_WORDS[word] if word in _WORDS else int(word))
        except ValueError:
            try:
                values.append(float(word))
            except ValueError:
                return None
    return values


def _filled(values: list[float | int], spec: TensorSpec, what: str) -> Array:
    kind = np.dtype(spec.dtype)
    shape = [1 if size == DYNAMIC else size for size in spec.shape]
    if spec.shape and spec.shape[-1] == DYNAMIC:
        shape[-1] = len(values)
    if len(values) > 1 and (not shape or shape[-1] != len(values)):
        raise UsageError(f"{what} gives {len(values)} values; the model takes {spec}.")
    for value in values:
        if np.issubdtype(kind, np.floating):
            fits = bool(abs(value) <= np.finfo(kind).max)
        else:
            low, high = (0, 1) if kind == np.bool_ else (np.iinfo(kind).min, np.iinfo(kind).max)
            fits = bool(value == value and low <= value <= high and value == int(value))
        if not fits:
            raise UsageError(f"{what}: {value} is no {spec.dtype}; the model takes {spec}.")
    array: Array = np.array(values if len(values) > 1 else values[0]).astype(kind)
    return np.ascontiguousarray(np.broadcast_to(array, shape)) if shape else array


def _read(path: Path, spec: TensorSpec, what: str) -> Array:
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(
            f"{what}: there is no file {path}, and it is no number.",
            hint="Give a .npy file, a number, or numbers with commas between them.",
        ) from error
    except Exception as error:  # numpy parses the header as Python, and raises whatever that raises
        raise DataError(f"{what}: {path} is not a .npy file that can be read: {error}.") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{what}: {path} holds several arrays; give a .npy file with one.")
    fits = array.ndim == len(spec.shape) and all(
        known in (DYNAMIC, size) for known, size in zip(spec.shape, array.shape, strict=True)
    )
    if array.dtype.name != spec.dtype or not fits:
        raise DataError(f"{what}: {path} holds {array.dtype.name} {list(array.shape)}; the model takes {spec}.")
    return array
