"""Places that images are read from: folders, archives and scikit-learn's digits.

Archives are never extracted: members are read in place, so a hostile path in one can write nothing.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import posixpath
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np
from PIL import Image

from trtdeploy.data.preprocessing import open_image
from trtdeploy.errors import DataError, RuntimeUnavailableError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"})
# What zipfile and the decompressors raise on damaged or encrypted content.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
)


class ImageStore(ABC):
    """Images by path, readable from several threads at once.

    Attributes:
        name: What messages call it.
        files: Paths of the image files, relative, with forward slashes, sorted; hidden ones are left out.
        folders: Paths of all folders that are known, the empty ones included.
    """

    def __init__(self, name: str, files: list[str], folders: set[str]) -> None:
        self.name = name
        visible = {path for path in files if not _is_hidden(path)}
        self.files = sorted(path for path in visible if posixpath.splitext(path)[1].lower() in IMAGE_SUFFIXES)
        self.folders = {path for path in folders if not _is_hidden(path)}
        for folder in {posixpath.dirname(path) for path in visible}:
            self.folders |= {folder, *map(str, PurePosixPath(folder).parents)}

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Return the bytes of one file."""

    def image(self, path: str) -> Image.Image:
        """Decode one image.

        Raises:
            DataError: It is missing, truncated or no image; the message names it.
        """
        content = self.content(path)
        try:
            return open_image(content)
        except (DataError, *_DAMAGE) as error:
            raise self._unusable(path, error) from error

    def content(self, path: str) -> bytes:
        """Return the bytes of one file.

        Raises:
            DataError: It is missing or truncated; the message names it.
        """
        try:
            return self.read(path)
        except (DataError, KeyError, *_DAMAGE) as error:
            raise self._unusable(path, error) from error

    def _unusable(self, path: str, error: Exception) -> DataError:
        reason = error.message if isinstance(error, DataError) else str(error)
        return DataError(f"{self.name}: {path}: {reason}", hint="Replace or remove this file.")

    def close(self) -> None:  # noqa: B027 - most stores hold nothing open
        """Release what the store holds open."""


class FolderStore(ImageStore):
    """A folder tree on disk."""

    def __init__(self, root: Path) -> None:
        self._root = root
        files: list[str] = []
        folders: set[str] = set()
        for folder, subfolders, names in os.walk(root, followlinks=True):
            relative = Path(folder).relative_to(root)
            subfolders[:] = [name for name in subfolders if not _is_hidden(name)]
            files += [(relative / name).as_posix() for name in names]
            folders |= {(relative / name).as_posix() for name in subfolders}
        super().__init__(str(root), files, folders)

    def read(self, path: str) -> bytes:
        return (self._root / path).read_bytes()


class ZipStore(ImageStore):
    """A .zip archive."""

    def __init__(self, path: Path) -> None:
        try:
            self._archive = zipfile.ZipFile(path)
        except _DAMAGE as error:
            raise DataError(f"{path} is not a zip archive: {error}.") from error
        entries = self._archive.infolist()
        super().__init__(
            str(path),
            [entry.filename for entry in entries if not entry.is_dir()],
            {entry.filename.rstrip("/") for entry in entries if entry.is_dir()},
        )

    def read(self, path: str) -> bytes:
        return self._archive.read(path)

    def close(self) -> None:
        self._archive.close()


class TarStore(ImageStore):
    """A .tar archive, plain or compressed; a compressed one is expanded into an unnamed temporary file first."""

    def __init__(self, path: Path) -> None:
        self._stream = _plain_stream(path)
        members: dict[str, tuple[int, int]] = {}
        folders: set[str] = set()
        try:
            with tarfile.open(fileobj=self._stream, mode="r:") as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    if member.isdir():
                        folders.add(name)
                    elif member.isfile():
                        members[name] = (member.offset_data, member.size)
                    elif member.islnk() and (target := member.linkname.removeprefix("./")) in members:
                        members[name] = members[target]
                # tarfile takes a damaged or missing header for the end; the real end is a block of zeros
                if os.pread(self._stream.fileno(), tarfile.BLOCKSIZE, archive.offset) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"it breaks off after {len(members)} files, at byte {archive.offset}")
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            self._stream.close()
            raise DataError(f"{path} is not a complete tar archive: {error}.") from error
        self._members = members
        super().__init__(str(path), list(members), folders)

    def read(self, path: str) -> bytes:
        offset, size = self._members[path]
        content = os.pread(self._stream.fileno(), size, offset)
        if len(content) != size:
            raise DataError(f"the archive ends after {len(content)} of {size} bytes.")
        return content

    def close(self) -> None:
        self._stream.close()


class DigitsStore(ImageStore):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels (UCI optical recognition test set), as grey images."""

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise RuntimeUnavailableError(
                "The dataset 'digits' ships with scikit-learn, which is not installed.",
                hint="pip install 'trtdeploy[training]'",
            ) from error
        digits = load_digits()
        # 0..16 grey levels in the source
        self._images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        self._index = {f"all/{label}/{index:04d}.png": index for index, label in enumerate(digits.target)}
        super().__init__("digits", list(self._index), set())

    def read(self, path: str) -> bytes:
        stream = io.BytesIO()
        self.image(path).save(stream, "PNG")  # lossless
        return stream.getvalue()

    def image(self, path: str) -> Image.Image:
        return Image.fromarray(self._images[self._index[path]])


def open_store(source: str | Path) -> ImageStore:
    """Open ``digits``, a folder, or a .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz archive.

    Raises:
        DataError: There is no such file, or it is of another kind.
    """
    if str(source) == "digits":
        return DigitsStore()
    path = Path(source)
    if path.is_dir():
        return FolderStore(path)
    if not path.is_file():
        raise DataError(f"There is no dataset at {path}.", hint="Give 'digits', a folder, or a .zip or .tar archive.")
    if path.suffix == ".zip":
        return ZipStore(path)
    if ".tar" in path.suffixes or path.suffix in (".tgz", ".txz"):
        return TarStore(path)
    raise DataError(
        f"{path} is neither a folder nor a .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz archive.",
        hint="Give 'digits', a folder, or an archive of <split>/<class>/*.jpg.",
    )


def _is_hidden(path: str) -> bool:
    """Say whether a file manager would hide ``path``, or a Mac added it to a zip archive of its own accord."""
    parts = path.split("/")
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in parts)


def _plain_stream(path: Path) -> IO[bytes]:
    openers: dict[str, Any] = {
        ".xz": lzma.open,
        ".txz": lzma.open,
        ".gz": gzip.open,
        ".tgz": gzip.open,
        ".bz2": bz2.open,
    }
    opener = openers.get(path.suffix)
    if opener is None:
        return path.open("rb")
    plain = tempfile.TemporaryFile(prefix="trtdeploy-dataset-")  # noqa: SIM115 - the caller closes it
    try:
        with cast(IO[bytes], opener(path)) as compressed:
            shutil.copyfileobj(compressed, plain, 1 << 20)
    except _DAMAGE as error:
        plain.close()
        raise DataError(f"{path} cannot be decompressed: {error}.") from error
    plain.seek(0)
    return plain
