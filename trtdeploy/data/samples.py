"""Real inputs of a model: a split of images, or arrays as the model takes them, and what is the same for all."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from trtdeploy.data import Dataset
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import DataError, UsageError
from trtdeploy.files import sha256_bytes
from trtdeploy.tensors import Array, TensorSpec


class Samples(Protocol):
    """Inputs of a model, one row per sample.

    Attributes:
        ids: One identifier per sample.
    """

    @property
    def ids(self) -> tuple[str, ...]:
        """One identifier per sample."""

    def shape(self, index: int) -> Hashable:
        """Return what is equal for samples that can be joined to a batch."""

    def batch(self, indices: Sequence[int]) -> Mapping[str, Array]:
        """Return the inputs of some samples of one shape, joined along the first axis."""


@dataclass(frozen=True)
class ImageSamples:
    """The calibration split of a dataset, preprocessed for the one input of a model."""

    dataset: Dataset
    preprocessing: Preprocessing
    input_name: str

    @property
    def ids(self) -> tuple[str, ...]:
        """The images' paths inside the dataset."""
        return self.dataset.split("calibration").ids

    def shape(self, index: int) -> Hashable:
        """Say that preprocessing gives every image one shape."""
        return ()

    def batch(self, indices: Sequence[int]) -> Mapping[str, Array]:
        """Decode and preprocess some images."""
        pixels = self.dataset.split("calibration").pixels(self.preprocessing, indices)
        return {self.input_name: self.preprocessing.normalise(pixels)}


class ArraySamples:
    """Inputs from .npy and .npz files: rows of the first axis are samples. Other sizes may differ between files.

    Args:
        path: A .npy file for the one input of a model; a .npz file with an array per input; or a folder of such files.
        inputs: What the model takes of each sample.
        fixed: Names of its other inputs; what the files hold for these is left alone.

    Raises:
        DataError: A file cannot be read, or does not hold what the model takes.
    """

    def __init__(self, path: Path, inputs: Sequence[TensorSpec], fixed: Collection[str] = ()) -> None:
        files = sorted(p for p in path.iterdir() if p.suffix in (".npy", ".npz")) if path.is_dir() else [path]
        if not files:
            raise DataError(f"{path} holds no .npy or .npz file.")
        self._parts = [_read(file, inputs, fixed) for file in files]
        rows = [len(next(iter(part.values()))) for part in self._parts]
        self._place = [(part, row) for part, count in enumerate(rows) for row in range(count)]
        self._ids = tuple(f"{files[part].name}:{row}" for part, row in self._place)
        if not self._place:
            raise DataError(f"{path} holds no sample.")

    @property
    def ids(self) -> tuple[str, ...]:
        """File and row of each sample."""
        return self._ids

    def shape(self, index: int) -> Hashable:
        """Return the shapes of a sample's arrays."""
        return tuple(array.shape[1:] for array in self._parts[self._place[index][0]].values())

    def batch(self, indices: Sequence[int]) -> Mapping[str, Array]:
        """Join some rows."""
        chosen = [self._place[index] for index in indices]
        return {name: np.stack([self._parts[part][name][row] for part, row in chosen]) for name in self._parts[0]}


@dataclass(frozen=True)
class WithFixed:
    """Samples of some inputs of a model, together with what its other inputs always get.

    Attributes:
        given: Those samples.
        fixed: Arrays by name of input.
    """

    given: Samples
    fixed: Mapping[str, Array]

    @property
    def ids(self) -> tuple[str, ...]:
        """Those of the samples."""
        return self.given.ids

    def shape(self, index: int) -> Hashable:
        """Return what that of the samples is."""
        return self.given.shape(index)

    def batch(self, indices: Sequence[int]) -> Mapping[str, Array]:
        """Join some samples; the fixed inputs are not repeated for each."""
        return {**self.given.batch(indices), **self.fixed}


class Opened(AbstractContextManager["Opened"]):
    """Samples together with the dataset behind them, if there is one, which ends with them."""

    def __init__(self, samples: Samples, dataset: Dataset | None) -> None:
        self.samples = samples
        self.dataset = dataset

    def __exit__(self, *exception: object) -> None:
        if self.dataset is not None:
            self.dataset.close()


def open_samples(
    source: str,
    inputs: Sequence[TensorSpec],
    preprocessing: Preprocessing | None,
    *,
    split_seed: int = 0,
    fixed: Mapping[str, Array] | None = None,
) -> Opened:
    """Open what ``--data`` names.

    Args:
        source: ``digits``, a folder or archive of ``<split>/<class>/*.jpg``, or .npy / .npz files or a folder of them.
        inputs: What the model takes.
        preprocessing: How images become model input, if that is known.
        split_seed: Of the splits that are drawn.
        fixed: Inputs that every batch gets as they are; see ``fixed_inputs``.

    Raises:
        DataError: It cannot be read or does not fit the model.
        UsageError: Images are given for a model whose preprocessing is not known, or which takes several inputs.
    """
    fixed = fixed or {}
    sampled = [spec for spec in inputs if spec.name not in fixed]
    if not sampled:
        raise UsageError("Every input of the model is fixed, so that samples have nothing to say.")
    opened = _open(source, sampled, preprocessing, split_seed, fixed)
    return Opened(WithFixed(opened.samples, fixed), opened.dataset) if fixed else opened


def _open(
    source: str,
    inputs: Sequence[TensorSpec],
    preprocessing: Preprocessing | None,
    split_seed: int,
    fixed: Collection[str],
) -> Opened:
    path = Path(source)
    if path.suffix in (".npy", ".npz") or (path.is_dir() and any(p.suffix in (".npy", ".npz") for p in path.iterdir())):
        return Opened(ArraySamples(path, inputs, fixed), None)
    if len(inputs) != 1:
        raise UsageError(
            f"Images cannot feed the {len(inputs)} inputs of the model: {', '.join(spec.name for spec in inputs)}.",
            hint="Give a .npz file with an array for each input, or --fixed NAME=FILE|VALUE for all but one.",
        )
    if preprocessing is None:
        raise UsageError(
            "The model does not say how images become its input.",
            hint="Give --preprocessing FILE.json (resize, crop, mean, std, layout), or the input itself as .npy.",
        )
    from trtdeploy.data import open_dataset

    dataset = open_dataset(source, split_seed=split_seed)
    return Opened(ImageSamples(dataset, preprocessing, inputs[0].name), dataset)


def draw(samples: Samples, count: int | None, seed: int) -> list[int]:
    """Return the indices of ``count`` samples, drawn with ``seed``; all if None.

    Raises:
        UsageError: There are not so many.
    """
    total = len(samples.ids)
    if count is None or count == total:
        return list(range(total))
    if not 1 <= count <= total:
        raise UsageError(f"--images {count}: there are {total} samples to calibrate with.")
    return sorted(np.random.default_rng(seed).choice(total, size=count, replace=False).tolist())


def batches(samples: Samples, indices: Sequence[int], size: int) -> Iterator[Mapping[str, Array]]:
    """Yield the chosen samples in batches of at most ``size``, one shape after the other."""
    for part in batch_indices(samples, indices, size):
        yield samples.batch(part)


def batch_indices(samples: Samples, indices: Sequence[int], size: int) -> list[list[int]]:
    """Return which samples are in each of the ``batches``."""
    groups: dict[Hashable, list[int]] = {}
    for index in indices:
        groups.setdefault(samples.shape(index), []).append(index)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def ids_digest(samples: Samples, indices: Sequence[int]) -> str:
    """Return the digest over the sorted identifiers, one per line."""
    return sha256_bytes("\n".join(sorted(samples.ids[index] for index in indices)).encode())


def _read(path: Path, inputs: Sequence[TensorSpec], fixed: Collection[str]) -> dict[str, Array]:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = {inputs[0].name: loaded} if isinstance(loaded, np.ndarray) else dict(loaded.items())
    except Exception as error:  # numpy raises a dozen kinds on damaged bytes
        raise DataError(f"{path} is not a .npy or .npz file that can be read: {error}.") from error
    arrays = {name: array for name, array in arrays.items() if name not in fixed}
    wanted = [spec.name for spec in inputs]
    if sorted(arrays) != sorted(wanted):
        missing = sorted(set(wanted) - set(arrays))
        raise DataError(
            f"{path} holds {sorted(arrays)}; the model takes {sorted(wanted)} of each sample.",
            hint=f"What is the same for all samples is given apart: --fixed {missing[0]}=FILE|VALUE"
            if missing
            else None,
        )
    for spec in inputs:
        apart = f"--fixed {spec.name}=FILE|VALUE gives it to every batch as it is."
        if not spec.shape:
            raise DataError(
                f"{path}: the input {spec} of the model is one value, so that no row can be a sample of it.", hint=apart
            )
        array = arrays[spec.name]
        fits = array.ndim == len(spec.shape) and all(
            known in (-1, given) for known, given in zip(spec.shape[1:], array.shape[1:], strict=True)
        )
        if array.dtype.name != spec.dtype or not fits:
            raise DataError(f"{path}: {spec.name} is {array.dtype.name} {list(array.shape)}; the model takes {spec}.")
    rows = {name: len(array) for name, array in arrays.items()}
    if len(set(rows.values())) != 1:
        listed = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise DataError(
            f"{path}: its arrays have different numbers of rows: {listed}.",
            hint="Every array needs a row per sample; an input that is no batch is given by --fixed NAME=FILE|VALUE.",
        )
    return {name: arrays[name] for name in wanted}
