from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trtdeploy.data import Dataset, open_dataset
from trtdeploy.data.dataset import SPLITS
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import DataError, RuntimeUnavailableError

PREPROCESSING = Preprocessing.square(8)
ARCHIVES = ("zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz", "txz")
COMPLETE = {
    "train": {"cat": 5, "dog": 4, "owl": 6},
    "calibration": {"cat": 2, "dog": 1, "owl": 2},
    "dev": {"cat": 2, "dog": 3, "owl": 1},
    "test": {"cat": 3, "dog": 2, "owl": 2},
}


@cache
def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tree(root: Path, layout: dict[str, dict[str, int]]) -> Path:
    """Write so many different images into each <split>/<class>."""
    seed = 0
    for split, by_class in layout.items():
        for class_name, count in by_class.items():
            folder = root / split / class_name
            folder.mkdir(parents=True)
            for index in range(count):
                (folder / f"{index:03d}.png").write_bytes(png(seed))
                seed += 1
    return root


def pack(root: Path, suffix: str, target: Path, *, top: str = "") -> Path:
    """Pack a tree as an archive, folders included, under an optional top folder."""
    archive = target / f"packed.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in sorted(root.rglob("*")):
                packed.write(path, Path(top) / path.relative_to(root))
    else:
        kind = {"tar": "", "tar.gz": "gz", "tgz": "gz", "tar.bz2": "bz2", "tar.xz": "xz", "txz": "xz"}[suffix]
        with tarfile.open(archive, f"w:{kind}") as packed:  # type: ignore[call-overload]
            packed.add(root, arcname=top or ".")
    return archive


def everything(dataset: Dataset, prefix: str = "") -> dict[str, list[tuple[str, str, bytes]]]:
    """Identifier, class name and pixels of every sample, by split."""
    found: dict[str, list[tuple[str, str, bytes]]] = {}
    for name in SPLITS:
        split = dataset.split(name)
        pixels = split.pixels(PREPROCESSING, range(len(split)))
        found[name] = [
            (path.removeprefix(prefix), dataset.classes[label], content.tobytes())
            for path, label, content in zip(split.ids, split.labels, pixels, strict=True)
        ]
    return found


def counts(dataset: Dataset) -> dict[str, Counter[str]]:
    return {name: Counter(dataset.classes[label] for label in dataset.split(name).labels) for name in SPLITS}


def members(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    return {name: dataset.split(name).ids for name in SPLITS}


def read_all(source: Path) -> int:
    with open_dataset(source) as dataset:
        return sum(len(samples) for samples in everything(dataset).values())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tree", COMPLETE)


# --- digits ---


def test_digits_is_the_whole_of_scikit_learns_set() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    with open_dataset("digits") as dataset:
        assert dataset.classes == tuple("0123456789")
        ids = [path for name in SPLITS for path in dataset.split(name).ids]
        assert len(ids) == len(set(ids)) == 1797
        for name in SPLITS:
            split = dataset.split(name)
            for index in range(0, len(split), 50):
                number = int(Path(split.ids[index]).stem)
                assert split.labels[index] == digits.target[number]
                image = np.asarray(split.image(index))
                assert image.dtype == np.uint8
                np.testing.assert_array_equal(image, np.round(digits.images[number] * 255 / 16))


def test_digits_splits_are_stratified_in_the_stated_shares() -> None:
    pytest.importorskip("sklearn")
    with open_dataset("digits") as dataset:
        found = counts(dataset)
        for class_name in dataset.classes:
            total = sum(found[name][class_name] for name in SPLITS)
            for name, share in (("test", 0.2), ("dev", 0.1), ("calibration", 0.1), ("train", 0.6)):
                assert abs(found[name][class_name] - share * total) <= 1.5


def test_the_seed_and_nothing_else_decides_the_splits() -> None:
    pytest.importorskip("sklearn")
    with (
        open_dataset("digits") as first,
        open_dataset("digits") as second,
        open_dataset("digits", split_seed=1) as third,
    ):
        assert members(first) == members(second)
        assert first.fingerprint == second.fingerprint
        assert first.fingerprint != third.fingerprint
        for name in SPLITS:
            assert set(first.split(name).ids) != set(third.split(name).ids)
            assert len(first.split(name)) == len(third.split(name))


def test_digits_without_scikit_learn_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(RuntimeUnavailableError, match="scikit-learn") as caught:
        open_dataset("digits")
    assert "pip install" in str(caught.value)


# --- folders and archives ---


def test_a_folder_gives_its_own_splits_labels_and_pixels(tree: Path) -> None:
    with open_dataset(tree) as dataset:
        assert dataset.classes == ("cat", "dog", "owl")
        assert {name: dict(found) for name, found in counts(dataset).items()} == COMPLETE
        for name in SPLITS:
            split = dataset.split(name)
            assert list(split.ids) == sorted(f"{path.relative_to(tree)}" for path in (tree / name).rglob("*.png"))
            for index, path in enumerate(split.ids):
                assert dataset.classes[split.labels[index]] == Path(path).parent.name
                np.testing.assert_array_equal(np.asarray(split.image(index)), np.asarray(Image.open(tree / path)))


@pytest.mark.parametrize("suffix", ARCHIVES)
@pytest.mark.parametrize("top", ["", "data/set"])
def test_an_archive_gives_what_its_folder_gives(tree: Path, tmp_path: Path, suffix: str, top: str) -> None:
    archive = pack(tree, suffix, tmp_path, top=top)
    with open_dataset(tree) as folder, open_dataset(str(archive)) as packed:
        assert packed.classes == folder.classes
        assert everything(packed, f"{top}/") == everything(folder)


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.xz"])
def test_an_archive_is_carved_like_its_folder(tmp_path: Path, suffix: str) -> None:
    root = write_tree(tmp_path / "tree", {"train": {"cat": 20, "dog": 31}})
    archive = pack(root, suffix, tmp_path)
    with open_dataset(root, split_seed=3) as folder, open_dataset(archive, split_seed=3) as packed:
        assert members(packed) == members(folder)
        assert packed.fingerprint == folder.fingerprint


def test_reading_leaves_the_folder_and_the_archive_alone(tree: Path, tmp_path: Path) -> None:
    archive = pack(tree, "tar.gz", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    read_all(tree)
    read_all(archive)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.xz"])
def test_closing_gives_every_descriptor_back(tree: Path, tmp_path: Path, suffix: str) -> None:
    archive = pack(tree, suffix, tmp_path)
    read_all(archive)
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("descriptors can be counted on Linux only")
    before = len(list(descriptors.iterdir()))
    for _ in range(3):
        read_all(archive)
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(DataError):
        read_all(archive)
    assert len(list(descriptors.iterdir())) == before


def test_batches_hold_the_split_in_order_whatever_their_size(tree: Path) -> None:
    with open_dataset(tree) as dataset:
        split = dataset.split("train")
        for size in (1, 4, 15, 100):
            batches = list(split.batches(PREPROCESSING, size))
            assert [len(batch.ids) for batch in batches[:-1]] == [size] * (len(batches) - 1)
            assert sum((batch.ids for batch in batches), ()) == split.ids
            np.testing.assert_array_equal(np.concatenate([batch.labels for batch in batches]), split.labels)
            inputs = np.concatenate([batch.inputs for batch in batches])
            for index in range(len(split)):
                np.testing.assert_array_equal(inputs[index], PREPROCESSING([split.image(index)])[0])


def test_pixels_come_in_the_order_of_the_indices(tree: Path) -> None:
    with open_dataset(tree) as dataset:
        split = dataset.split("train")
        forward = split.pixels(PREPROCESSING, range(len(split)))
        np.testing.assert_array_equal(split.pixels(PREPROCESSING, np.array([7, 0, 7])), forward[[7, 0, 7]])


# --- splits ---


def test_what_has_no_folder_is_drawn_from_train_and_no_sample_is_in_two_splits(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", {"train": {"cat": 50, "dog": 30}, "test": {"cat": 4, "dog": 6}})
    with open_dataset(root) as dataset:
        assert {name: dict(found) for name, found in counts(dataset).items()} == {
            "train": {"cat": 40, "dog": 24},
            "calibration": {"cat": 5, "dog": 3},
            "dev": {"cat": 5, "dog": 3},
            "test": {"cat": 4, "dog": 6},
        }
        ids = [path for paths in members(dataset).values() for path in paths]
        assert sorted(ids) == sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
        assert all(path.startswith("test/") for path in dataset.split("test").ids)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "Val"])
def test_val_without_test_is_the_test_split(tmp_path: Path, name: str) -> None:
    root = write_tree(tmp_path / "tree", {"train": {"cat": 10, "dog": 10}, name: {"cat": 3, "dog": 2}})
    with open_dataset(root) as dataset:
        assert {Path(path).parts[0] for path in dataset.split("test").ids} == {name}
        assert len(dataset.split("test")) == 5
        assert {Path(path).parts[0] for path in dataset.split("dev").ids} == {"train"}
        assert len(dataset.split("dev")) == 2


def test_val_beside_test_is_the_dev_split(tmp_path: Path) -> None:
    layout = {"train": {"cat": 10}, "val": {"cat": 3}, "test": {"cat": 2}}
    with open_dataset(write_tree(tmp_path / "tree", layout)) as dataset:
        assert {name: len(dataset.split(name)) for name in SPLITS} == {
            "train": 9,
            "calibration": 1,
            "dev": 3,
            "test": 2,
        }


def test_a_class_may_be_absent_from_test_but_keeps_its_label(tmp_path: Path) -> None:
    layout = {"train": {"ant": 5, "bee": 5, "cow": 5}, "test": {"ant": 1, "cow": 1}}
    with open_dataset(write_tree(tmp_path / "tree", layout)) as dataset:
        assert dataset.classes == ("ant", "bee", "cow")
        assert dataset.split("test").labels.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("classes", "images", "sizes"),
    [
        (10, 2500, {"test": 5000, "dev": 2040, "calibration": 510, "train": 17_450}),
        (330, 40, {"test": 2640, "dev": 1320, "calibration": 330, "train": 8910}),
    ],
)
def test_carved_splits_of_large_data_stay_within_their_stated_size(
    monkeypatch: pytest.MonkeyPatch, classes: int, images: int, sizes: dict[str, int]
) -> None:
    # 2,048 for dev are 204.8 of each of 10 classes, 512 for calibration 1.55 of 330: rounding up would exceed them.
    from trtdeploy.data import dataset as module
    from trtdeploy.data.stores import ImageStore

    class Paths(ImageStore):
        def read(self, path: str) -> bytes:
            raise AssertionError("no image is read to make the splits")

    paths = [f"train/{label:03d}/{index:04d}.png" for label in range(classes) for index in range(images)]
    monkeypatch.setattr(module, "open_store", lambda source: Paths("paths", paths, set()))
    with open_dataset("paths") as dataset:
        assert {name: len(dataset.split(name)) for name in SPLITS} == sizes


def test_the_smallest_class_that_can_be_split_is_and_a_smaller_one_is_refused(tmp_path: Path) -> None:
    enough = write_tree(tmp_path / "enough", {"train": {"cat": 4, "dog": 9}})
    with open_dataset(enough) as dataset:
        assert {name: found["cat"] for name, found in counts(dataset).items()} == dict.fromkeys(SPLITS, 1)
    small = write_tree(tmp_path / "small", {"train": {"cat": 3, "dog": 9}})
    with pytest.raises(DataError, match="class 'cat' has 3 training images; at least 4 are needed"):
        open_dataset(small)


def test_an_unknown_split_is_refused_with_those_there_are(tree: Path) -> None:
    with open_dataset(tree) as dataset, pytest.raises(DataError, match=r"no split 'val'.*'dev'"):
        dataset.split("val")


def test_the_fingerprint_knows_classes_splits_and_labels(tree: Path, tmp_path: Path) -> None:
    with open_dataset(tree) as dataset:
        before = dataset.fingerprint
    (tree / "test" / "cat" / "000.png").rename(tree / "test" / "dog" / "009.png")
    with open_dataset(tree) as dataset:
        assert dataset.fingerprint != before


# --- layouts that are refused ---


def test_a_path_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset at .*missing"):
        open_dataset(tmp_path / "missing")


@pytest.mark.parametrize("name", ["images.rar", "images", "images.txt"])
def test_a_file_of_another_kind_is_refused_with_the_accepted_kinds(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(DataError, match=r"neither a folder nor a \.zip, \.tar"):
        open_dataset(tmp_path / name)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training images"):
        open_dataset(tmp_path)


def test_test_images_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training images"):
        open_dataset(write_tree(tmp_path / "tree", {"test": {"cat": 3}}))


@pytest.mark.parametrize("split", ["train", "dev", "test"])
@pytest.mark.parametrize("suffix", ["folder", "zip", "tar"])
@pytest.mark.parametrize("content", ["nothing", "a text", "a hidden file"])
def test_an_empty_class_folder_is_named(tree: Path, tmp_path: Path, split: str, suffix: str, content: str) -> None:
    (tree / split / "yak").mkdir()
    if content == "a text":
        (tree / split / "yak" / "notes.txt").write_text("to be collected")
    elif content == "a hidden file":
        (tree / split / "yak" / ".a.png").write_bytes(png(0))
    source = tree if suffix == "folder" else pack(tree, suffix, tmp_path)
    with pytest.raises(DataError, match=f"class folder {split}/yak holds no image"):
        open_dataset(source)


def test_a_class_that_only_test_has_is_named(tree: Path) -> None:
    (tree / "test" / "yak").mkdir()
    (tree / "test" / "yak" / "0.png").write_bytes(png(0))
    with pytest.raises(DataError, match="test/ has classes that train/ lacks: yak"):
        open_dataset(tree)


@pytest.mark.parametrize(
    "where", ["stray.png", "train/stray.png", "train/cat/more/stray.png", "unlabelled/cat/stray.png"]
)
def test_an_image_at_the_wrong_depth_is_named(tree: Path, where: str) -> None:
    (tree / where).parent.mkdir(parents=True, exist_ok=True)
    (tree / where).write_bytes(png(0))
    with pytest.raises(DataError, match=f"{where} is not at <split>/<class>/<image>"):
        open_dataset(tree)


def test_two_datasets_in_one_tree_are_refused(tree: Path) -> None:
    write_tree(tree / "second", {"train": {"cat": 5}})
    with pytest.raises(DataError, match="more than one dataset"):
        open_dataset(tree)


@pytest.mark.parametrize("suffix", ["folder", "zip", "tar"])
def test_hidden_files_and_folders_are_ignored(tree: Path, tmp_path: Path, suffix: str) -> None:
    with open_dataset(tree) as dataset:
        expected = everything(dataset)
    for hidden in (
        ".thumbnail.png",
        "train/.DS_Store",
        "train/cat/._000.png",
        "train/.ipynb_checkpoints/000.png",
        "train/.empty/",
        ".git/train/cat/0.png",
        "__MACOSX/train/cat/000.png",
    ):
        path = tree / hidden
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if hidden.endswith("/") else path.write_bytes(b"not an image")
    with open_dataset(tree if suffix == "folder" else pack(tree, suffix, tmp_path)) as dataset:
        assert everything(dataset) == expected


def test_files_that_are_no_images_are_ignored_where_images_are(tree: Path) -> None:
    (tree / "README.md").write_text("A dataset.")
    (tree / "train" / "cat" / "000.json").write_text("{}")
    with open_dataset(tree) as dataset:
        assert {name: dict(found) for name, found in counts(dataset).items()} == COMPLETE


# --- damage ---


def damage_one(tree: Path, change: Callable[[bytes], bytes]) -> str:
    path = tree / "train" / "dog" / "001.png"
    path.write_bytes(change(path.read_bytes()))
    return "train/dog/001.png"


@pytest.mark.parametrize("suffix", ["folder", "zip", "tar.gz"])
@pytest.mark.parametrize(
    "change",
    [lambda content: content[:-40], lambda content: b"", lambda content: b"<html>404</html>"],
    ids=["truncated", "empty", "no image"],
)
def test_a_damaged_image_is_named(tree: Path, tmp_path: Path, suffix: str, change: Callable[[bytes], bytes]) -> None:
    damaged = damage_one(tree, change)
    source = tree if suffix == "folder" else pack(tree, suffix, tmp_path)
    with open_dataset(source) as dataset:
        assert len(dataset.split("test").pixels(PREPROCESSING, [0, 1])) == 2
        with pytest.raises(DataError) as caught:
            list(dataset.split("train").batches(PREPROCESSING, 4))
    assert f"{source}: {damaged}: " in caught.value.message
    assert caught.value.hint == "Replace or remove this file."


def test_an_image_that_cannot_be_resized_is_named(tree: Path) -> None:
    Image.new("L", (1, 2_000_000)).save(tree / "train" / "dog" / "001.png")
    with open_dataset(tree) as dataset, pytest.raises(DataError, match=r"train/dog/001\.png: The image of 1x2000000"):
        list(dataset.split("train").batches(Preprocessing.square(64), 4))


def test_an_image_that_disappears_after_opening_is_named(tree: Path) -> None:
    with open_dataset(tree) as dataset:
        (tree / "train" / "owl" / "003.png").unlink()
        with pytest.raises(DataError, match=r"train/owl/003\.png: .*No such file"):
            dataset.split("train").pixels(PREPROCESSING, range(len(dataset.split("train"))))


def test_an_archive_that_shrinks_after_opening_is_an_error_that_names_the_image(tree: Path, tmp_path: Path) -> None:
    archive = pack(tree, "tar", tmp_path)
    with open_dataset(archive) as dataset:
        os.truncate(archive, 2000)
        with pytest.raises(DataError, match=r"train/owl/005\.png: the archive ends after 0 of \d+ bytes"):
            dataset.split("train").image(len(dataset.split("train")) - 1)


@pytest.mark.parametrize("suffix", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_an_archive_cut_anywhere_is_refused(tree: Path, tmp_path: Path, suffix: str) -> None:
    archive = pack(tree, suffix, tmp_path)
    content = archive.read_bytes()
    for end in [*np.linspace(0, len(content) - 1, 40).astype(int), len(content) - 8, len(content) - 2]:
        archive.write_bytes(content[:end])
        with pytest.raises(DataError, match="packed"):
            read_all(archive)


def test_a_plain_tar_cut_anywhere_before_its_end_mark_is_refused(tree: Path, tmp_path: Path) -> None:
    archive = pack(tree, "tar", tmp_path)
    content = archive.read_bytes()
    end_mark = len(content.rstrip(b"\0"))
    end_mark += -end_mark % tarfile.BLOCKSIZE
    cuts = {*range(0, end_mark + 1, tarfile.BLOCKSIZE), *range(100, end_mark, 1777), end_mark + 100}
    for end in sorted(cuts):
        archive.write_bytes(content[:end])
        with pytest.raises(DataError, match="not a complete tar archive"):
            read_all(archive)
    archive.write_bytes(content[: end_mark + 2 * tarfile.BLOCKSIZE])
    assert read_all(archive) == 33


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_damaged_header_inside_a_tar_is_not_taken_for_its_end(tree: Path, tmp_path: Path, kind: int) -> None:
    archive = tmp_path / "packed.tar"
    with tarfile.open(archive, "w", format=kind) as packed:
        packed.add(tree, arcname=".")
    assert read_all(archive) == 33
    content = bytearray(archive.read_bytes())
    position = content.index(b"./test/dog/001.png")
    content[position + 148 : position + 156] = b"garbage!"
    archive.write_bytes(content)
    with pytest.raises(DataError, match="not a complete tar archive"):
        open_dataset(archive)


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_changed_bytes_in_an_archive_raise_data_errors_and_nothing_else(
    tree: Path, tmp_path: Path, suffix: str
) -> None:
    archive = pack(tree, suffix, tmp_path)
    content = archive.read_bytes()
    random = np.random.default_rng(7)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        for position in random.integers(len(content), size=3):
            damaged[position] ^= int(random.integers(1, 256))
        archive.write_bytes(damaged)
        try:
            read_all(archive)
        except DataError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("suffix", ARCHIVES)
@pytest.mark.parametrize("content", [b"", b"garbage" * 500], ids=["empty", "garbage"])
def test_a_file_that_only_its_name_makes_an_archive_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    archive = tmp_path / f"packed.{suffix}"
    archive.write_bytes(content)
    with pytest.raises(DataError, match="packed"):
        open_dataset(archive)


def test_an_encrypted_zip_is_an_error_that_names_the_image(tree: Path, tmp_path: Path) -> None:
    archive = pack(tree, "zip", tmp_path)
    content = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = content.find(signature)
        while position >= 0:
            flags = struct.unpack_from("<H", content, position + offset)[0]
            struct.pack_into("<H", content, position + offset, flags | 1)
            position = content.find(signature, position + 4)
    archive.write_bytes(content)
    with open_dataset(archive) as dataset, pytest.raises(DataError, match=r"train/cat/000\.png: .*encrypted"):
        dataset.split("train").image(0)


# --- hostile and odd archives ---


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.xz"])
@pytest.mark.parametrize(
    "name", ["../evil.png", "../../evil/train/cat/0.png", "{root}/evil/train/cat/0.png", "../evil.txt"]
)
def test_members_that_point_outside_write_nothing_outside(tree: Path, tmp_path: Path, suffix: str, name: str) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    name = name.format(root=tmp_path)
    archive = inner / f"packed.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr(name, png(1))
            for path in sorted(tree.rglob("*.png")):
                packed.write(path, path.relative_to(tree))
    else:
        with tarfile.open(archive, f"w:{suffix.partition('.')[2]}") as packed:  # type: ignore[call-overload]
            member = tarfile.TarInfo(name)
            member.size = len(png(1))
            packed.addfile(member, io.BytesIO(png(1)))
            packed.add(tree, arcname=".")
    before = set(tmp_path.rglob("*"))
    if name.endswith(".txt"):
        assert read_all(archive) == 33
    else:
        with pytest.raises(DataError):
            read_all(archive)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_a_member_that_is_there_twice_is_one_sample(tmp_path: Path, suffix: str) -> None:
    root = write_tree(tmp_path / "tree", {"train": {"cat": 8}})
    archive = pack(root, suffix, tmp_path)
    if suffix == "zip":
        with zipfile.ZipFile(archive, "a") as packed:
            for path in root.rglob("*.png"):
                packed.write(path, path.relative_to(root))
    else:
        with tarfile.open(archive, "a:") as packed:
            packed.add(root, arcname=".")
    with open_dataset(archive) as dataset:
        ids = [path for paths in members(dataset).values() for path in paths]
    assert sorted(ids) == [f"train/cat/{index:03d}.png" for index in range(8)]


def test_hard_links_in_a_tar_are_images_like_any_other(tree: Path, tmp_path: Path) -> None:
    os.link(tree / "train" / "cat" / "000.png", tree / "train" / "cat" / "linked.png")
    archive = pack(tree, "tar", tmp_path)
    with tarfile.open(archive) as packed:
        assert any(member.islnk() for member in packed)
    with open_dataset(tree) as folder, open_dataset(archive) as packed_dataset:
        assert everything(packed_dataset) == everything(folder)


def test_file_names_in_any_script_and_suffixes_in_any_case_are_read(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    for split in SPLITS:
        (root / split / "größe 大").mkdir(parents=True)
        (root / split / "größe 大" / "écran 1.PNG").write_bytes(png(1))
    for source in (root, *(pack(root, suffix, tmp_path) for suffix in ("zip", "tar", "tar.xz"))):
        with open_dataset(source) as dataset:
            assert dataset.classes == ("größe 大",)
            assert len(dataset.split("test").pixels(PREPROCESSING, [0])) == 1


@pytest.mark.parametrize(
    ("name", "words"), [(b"caf\xe9", "is not UTF-8"), (b"two\nlines", "has a line break"), (b"a\r", "has a line break")]
)
def test_a_name_that_no_list_of_labels_can_hold_is_refused(name: bytes, words: str, tree: Path) -> None:
    os.rename(os.fsencode(tree) + b"/train/cat", os.fsencode(tree) + b"/train/" + name)
    with pytest.raises(DataError, match=words):
        open_dataset(tree)


def test_names_in_any_script_are_taken(tmp_path: Path) -> None:
    names = ["\u0645\u0633\u062a\u0634\u0641\u0649", "\u65e5\u672c\u8a9e", "\u202enoon", "a\u00a0b", "<b>"]
    tree = write_tree(tmp_path / "data", {"train": dict.fromkeys(names, 4)})
    with open_dataset(tree) as dataset:
        assert set(dataset.classes) == set(names)
