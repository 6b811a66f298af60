"""Whose a cache in a runtime's own bytes is: the sidecar ``<file>.json``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from trtdeploy.errors import TimingCacheError, TrtDeployError
from trtdeploy.file_format import FileFormat
from trtdeploy.files import sha256_bytes
from trtdeploy.version import __version__

_MAX_READS = 50
_BEGINNING = b'{\n "format": 1,\n "fingerprint": {'
"""Of every sidecar: what begins so and cannot be read is a damaged one."""


class Fingerprint(BaseModel):
    """What a cache belongs to; one of another machine or version may mislead or crash a build.

    Attributes:
        kind: "timing" for tactics, "rtx-runtime" for the kernels that TensorRT-RTX compiles at run time.
        runtime: Name of the runtime.
        version: Its exact version.
        device: Name of the GPU.
        capability: Its compute capability.
        cuda: CUDA of the runtime library.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["timing", "rtx-runtime"]
    runtime: str
    version: str
    device: str
    capability: str
    cuda: str

    def differences(self, other: Fingerprint) -> str:
        """Say in which fields two fingerprints differ; empty if in none."""
        fields = type(self).model_fields
        return ", ".join(
            f"{name} {getattr(self, name)!r}, expected {getattr(other, name)!r}"
            for name in fields
            if getattr(self, name) != getattr(other, name)
        )

    @property
    def file_name(self) -> str:
        """A file name for a folder that serves several machines."""
        parts = [self.runtime, self.version, self.device, f"cc{self.capability}", f"cuda{self.cuda}"]
        suffix = "timing" if self.kind == "timing" else "runtime-cache"
        return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts)) + f".{suffix}"


class Sidecar(FileFormat):
    """What lies beside a blob.

    It is replaced before the blob, and names the digests of the blob that comes and of the blob that was there: it is
    right before, between and after the two replacements, wherever a kill hits.

    Attributes:
        fingerprint: Whose the blob is.
        sha256: Digest of the blob.
        previous_sha256: Digest of the blob that it replaced, which belonged to the same; None if there was none.
        nbytes: Length of the blob.
        entries: How many entries it has, as far as the runtime says so.
        updated_at: When it was last written, UTC.
    """

    TITLE: ClassVar[str] = "the sidecar of a timing cache"
    ERROR: ClassVar[type[TrtDeployError]] = TimingCacheError
    OTHERWISE: ClassVar[str] = " Or use another file, which need not exist yet."

    format: Literal[1] = 1
    fingerprint: Fingerprint
    sha256: str
    previous_sha256: str | None = None
    nbytes: int = Field(ge=0)
    entries: int = Field(ge=0)
    updated_at: AwareDatetime
    minor: int = Field(default=1, ge=0)
    written_by: str = __version__

    def vouches_for(self, blob: bytes) -> bool:
        """Say whether these are the bytes that it lies beside; if not, the fingerprint says nothing about them."""
        return sha256_bytes(blob) in (self.sha256, self.previous_sha256)


def sidecar_path(path: Path) -> Path:
    """Return where the sidecar of a blob lies."""
    return path.with_name(path.name + ".json")


def parse_sidecar(path: Path, content: bytes | None) -> Sidecar | None:
    """Return what the file at the sidecar's place of a cache says; None if it is no sidecar.

    Raises:
        TimingCacheError: A newer trtdeploy wrote it, in a format that this one does not read.
    """
    if content is None:
        return None
    try:
        return Sidecar.read(content, sidecar_path(path))
    except ValidationError:
        return None


def is_sidecar(path: Path, content: bytes | None) -> bool:
    """Say whether the file at the sidecar's place of a cache is a sidecar, damaged ones included.

    Raises:
        TimingCacheError: A newer trtdeploy wrote it, in a format that this one does not read.
    """
    return content is not None and (content.startswith(_BEGINNING) or parse_sidecar(path, content) is not None)


def read_sidecar_bytes(path: Path) -> bytes | None:
    """Return the bytes of the file at a blob's sidecar's place; None if there is none."""
    try:
        return sidecar_path(path).read_bytes()
    except FileNotFoundError:
        return None


def read_pair(path: Path) -> tuple[bytes | None, Sidecar | None]:
    """Return a blob and its sidecar as they were at one moment, with or without the lock; None for what is missing.

    Raises:
        TimingCacheError: They are replaced faster than they can be read, or the sidecar is of a newer format.
        OSError: They cannot be read.
    """
    before = read_sidecar_bytes(path)
    for _ in range(_MAX_READS):
        try:
            blob = path.read_bytes()
        except FileNotFoundError:
            blob = None
        after = read_sidecar_bytes(path)
        if before == after:
            return blob, parse_sidecar(path, after)
        before = after
    raise TimingCacheError(f"{path} changed each of the {_MAX_READS} times that it was read.", hint="Try again.")
