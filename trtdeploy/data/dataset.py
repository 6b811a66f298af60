"""A dataset as disjoint, seeded, stratified splits of labelled images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.data.stores import ImageStore, open_store
from trtdeploy.errors import DataError
from trtdeploy.files import sha256_bytes

SPLITS = ("train", "calibration", "dev", "test")
_SPLIT_OF_FOLDER = {
    "train": "train",
    "training": "train",
    "all": "train",
    "calibration": "calibration",
    "calib": "calibration",
    "dev": "dev",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "test": "test",
}
# What is taken from the training images for a split that has no folder of its own: a share, and at most so many.
_CARVED = {"test": (0.2, None), "dev": (0.1, 2048), "calibration": (0.1, 512)}
_DECODING_THREADS = 4


@dataclass(frozen=True)
class Batch:
    """Consecutive samples of a split: identifiers, label indices and model input."""

    ids: tuple[str, ...]
    labels: NDArray[np.int64]
    inputs: NDArray[np.float32]


class Split:
    """One part of a dataset.

    Attributes:
        ids: One identifier per sample: its path inside the dataset.
        labels: Index of each sample's class in the dataset's ``classes``.
    """

    def __init__(self, name: str, store: ImageStore, ids: Sequence[str], labels: Sequence[int]) -> None:
        self.name = name
        self.ids = tuple(ids)
        self.labels: NDArray[np.int64] = np.asarray(labels, dtype=np.int64)
        self._store = store

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> Image.Image:
        """Decode one image."""
        return self._store.image(self.ids[index])

    def file(self, index: int) -> bytes:
        """Return the bytes of one image's file as they are.

        Raises:
            DataError: It is missing; the message names it.
        """
        return self._store.content(self.ids[index])

    def pixels(self, preprocessing: Preprocessing, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Decode, resize and crop some images to ``(len(indices), height, width, channels)`` bytes.

        Raises:
            DataError: An image is missing, truncated or no image; the message names it.
        """

        def decode(index: int | np.int64) -> NDArray[np.uint8]:
            image = self.image(int(index))
            try:
                return preprocessing.pixels(image)
            except DataError as error:
                raise DataError(f"{self._store.name}: {self.ids[index]}: {error.message}") from error

        with ThreadPoolExecutor(_DECODING_THREADS) as executor:
            return np.stack(list(executor.map(decode, indices)))

    def batches(self, preprocessing: Preprocessing, batch_size: int) -> Iterator[Batch]:
        """Yield the split in order, as model input; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            indices = range(start, min(start + batch_size, len(self)))
            yield Batch(
                ids=self.ids[indices.start : indices.stop],
                labels=self.labels[indices.start : indices.stop],
                inputs=preprocessing.normalise(self.pixels(preprocessing, indices)),
            )


class Dataset:
    """Labelled images in the splits ``train``, ``calibration``, ``dev`` and ``test``; no sample is in two of them.

    Use it as a context manager, or call ``close``.

    Attributes:
        name: Where it came from.
        classes: Class names; label ``i`` means ``classes[i]``.
    """

    def __init__(self, store: ImageStore, classes: Sequence[str], members: dict[str, list[tuple[str, int]]]) -> None:
        self.name = store.name
        self.classes = tuple(classes)
        self._store = store
        self._splits = {
            name: Split(name, store, [path for path, _ in pairs], [label for _, label in pairs])
            for name, pairs in members.items()
        }

    def split(self, name: str) -> Split:
        """Return one of ``SPLITS``."""
        if name not in self._splits:
            raise DataError(f"{self.name} has no split {name!r}; it has {sorted(self._splits)}.")
        return self._splits[name]

    @property
    def fingerprint(self) -> str:
        """Digest of the classes and of every sample's split, path and label."""
        content = [self.classes, {name: [split.ids, split.labels.tolist()] for name, split in self._splits.items()}]
        return sha256_bytes(json.dumps(content).encode())[:16]

    def close(self) -> None:
        """Close the archive behind it."""
        self._store.close()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_dataset(source: str | Path, *, split_seed: int = 0) -> Dataset:
    """Open ``digits``, or any ``<split>/<class>/*.jpg|png`` tree in a folder, .zip or .tar archive.

    Folders named train, calibration, dev (or val) and test are taken as they are. What is missing is drawn from the
    training images, stratified by class: 20% for test, 10% (at most 2,048) for dev, 10% (at most 512) for
    calibration, and never less than one of each class. A tree with val but no test uses val as test, as ImageNet
    does. The same source and ``split_seed`` always give the same splits.

    Raises:
        DataError: There are no images, a class folder is empty, a class is too small to be split, or a name is not one
            line of UTF-8.
    """
    store = open_store(source)
    try:
        _require_plain_names(store)
        folders = _read_layout(store)
        classes = sorted(folders["train"])
        return Dataset(store, classes, _carve(store.name, classes, folders, split_seed))
    except BaseException:
        store.close()
        raise


def _require_plain_names(store: ImageStore) -> None:
    """Refuse names that checkpoints, ledgers and Triton's list of labels, one a line, cannot hold."""
    for path in store.files:
        if path.isprintable():
            continue
        if path.splitlines() != [path]:
            raise DataError(f"{store.name}: the name {path!r} has a line break.", hint="Rename it.")
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{store.name}: the name {path!r} is not UTF-8.", hint="Rename it.") from error


def _read_layout(store: ImageStore) -> dict[str, dict[str, list[str]]]:
    """Return split -> class -> sorted paths, as the folders say."""
    layout: dict[str, dict[str, list[str]]] = {}
    prefixes: set[PurePosixPath] = set()
    for path in store.files:
        parts = PurePosixPath(path).parts
        if len(parts) < 3 or parts[-3].lower() not in _SPLIT_OF_FOLDER:
            raise DataError(
                f"{store.name}: {path} is not at <split>/<class>/<image>.",
                hint=f"Name the split folders {', '.join(SPLITS)}; one folder per class inside each.",
            )
        prefixes.add(PurePosixPath(*parts[:-3]))
        layout.setdefault(_SPLIT_OF_FOLDER[parts[-3].lower()], {}).setdefault(parts[-2], []).append(path)
    if "train" not in layout:
        raise DataError(
            f"{store.name} holds no training images.",
            hint="Expected train/<class>/*.jpg or *.png, and test/ beside it.",
        )
    if len(prefixes) > 1:
        shown = ", ".join(sorted(map(str, prefixes))[:3])
        raise DataError(f"{store.name} holds more than one dataset: {shown}.", hint="Keep one of them.")
    depth = len(prefixes.pop().parts)
    for folder in sorted(store.folders):
        parts = PurePosixPath(folder).parts[depth:]
        if len(parts) == 2 and parts[0].lower() in _SPLIT_OF_FOLDER:
            split = _SPLIT_OF_FOLDER[parts[0].lower()]
            if parts[1] not in layout.get(split, {}):
                raise DataError(f"{store.name}: the class folder {folder} holds no image.")
    for split, by_class in layout.items():
        strangers = sorted(set(by_class) - set(layout["train"]))
        if strangers:
            raise DataError(f"{store.name}: {split}/ has classes that train/ lacks: {', '.join(strangers[:5])}.")
    if "test" not in layout and "dev" in layout:
        layout["test"] = layout.pop("dev")
    return layout


def _carve(
    name: str, classes: Sequence[str], layout: dict[str, dict[str, list[str]]], seed: int
) -> dict[str, list[tuple[str, int]]]:
    """Give every split its samples, drawing from the training images what has no folder of its own."""
    missing = [split for split in _CARVED if split not in layout]
    shares = {split: _CARVED[split] for split in missing}
    total = sum(len(paths) for paths in layout["train"].values())
    members: dict[str, list[tuple[str, int]]] = {split: [] for split in SPLITS}
    for label, class_name in enumerate(classes):
        paths = layout["train"][class_name]
        if len(paths) <= len(missing):
            raise DataError(
                f"{name}: class {class_name!r} has {len(paths)} training images; "
                f"at least {len(missing) + 1} are needed to draw {', '.join(missing)} from them."
            )
        order = np.random.default_rng([seed, label]).permutation(len(paths))
        start = 0
        for split in missing:
            share, at_most = shares[split]
            count = round(share * len(paths))
            if at_most is not None:
                count = min(count, at_most * len(paths) // total)
            count = max(1, count)
            members[split] += [(paths[index], label) for index in order[start : start + count]]
            start += count
        members["train"] += [(paths[index], label) for index in order[start:]]
        for split in SPLITS[1:]:
            if split not in missing:
                members[split] += [(path, label) for path in layout[split].get(class_name, [])]
    return {split: sorted(pairs) for split, pairs in members.items()}
