"""A cache in the runtime's own bytes, with a sidecar that says whose it is.

The file holds nothing but the runtime's bytes, so that ``trtexec --timingCacheFile`` shares it. TensorRT does not say
where a cache comes from, and takes garbage silently as empty: the sidecar ``<file>.json`` has fingerprint and digest.

The bytes are replaced first, the sidecar second. A kill between the two leaves new bytes with the old digest: like
bytes that another program wrote, they are taken if the runtime takes them, and the sidecar's fingerprint still holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trtdeploy.errors import TimingCacheError
from trtdeploy.files import atomic_write, sha256_bytes
from trtdeploy.timing_cache.store import CacheMode, CacheStore, logger

Validate = Callable[[bytes], int]
"""Returns the number of entries of a blob; raises ``TimingCacheError`` for what the runtime does not take."""
Combine = Callable[[bytes, bytes], bytes]
"""Returns the first blob with what the second adds; raises ``TimingCacheError`` if they do not belong together."""


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


class Sidecar(BaseModel):
    """What lies beside a blob.

    Attributes:
        fingerprint: Whose it is.
        sha256: Digest of the blob.
        nbytes: Its length.
        entries: How many entries it has, as far as the runtime says so.
        updated_at: When it was last written, UTC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    fingerprint: Fingerprint
    sha256: str
    nbytes: int
    entries: int
    updated_at: str


def sidecar_path(path: Path) -> Path:
    """Return where the sidecar of a blob lies."""
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path) -> Sidecar | None:
    """Return the sidecar of a blob; None where there is none that can be read."""
    try:
        return Sidecar.model_validate_json(sidecar_path(path).read_bytes())
    except (OSError, ValidationError):
        return None


class BlobCache:
    """The cache of one runtime on one machine.

    Args:
        path: The file, which need not exist yet; in an existing folder, one named for the fingerprint.
        fingerprint: What it has to belong to.
        mode: Whether it may be changed; see ``CacheStore``.
        timeout_s: How long to wait for the lock.
    """

    def __init__(
        self, path: str | Path, fingerprint: Fingerprint, *, mode: CacheMode = "update", timeout_s: float = 60.0
    ) -> None:
        self.path = Path(path) / fingerprint.file_name if Path(path).is_dir() else Path(path)
        self.fingerprint = fingerprint
        self.mode = mode
        self._store = CacheStore(self.path, mode=mode, timeout_s=timeout_s)

    def load(self, validate: Validate) -> bytes:
        """Return the blob, or nothing where there is none. What cannot be used is set aside with a warning.

        Raises:
            TimingCacheError: The file cannot be locked or read; or it cannot be used and the mode forbids to set it
                aside; or the mode is "verify" and there is none.
        """
        with self._store.locked():
            blob = self._current(validate)
        if not blob and self.mode == "verify":
            raise TimingCacheError(
                f"There is no timing cache at {self.path} to verify a build by.",
                hint="Build once with --timing-cache-mode update.",
            )
        return blob

    def refuse(self, reason: str) -> None:
        """Set the file aside because the runtime does not want it on this device after all.

        Raises:
            TimingCacheError: The file cannot be locked, or the mode forbids to set it aside.
        """
        with self._store.locked():
            if self.path.exists():
                self._set_aside("foreign", reason)

    def merge(self, blob: bytes, combine: Combine, validate: Validate) -> bytes:
        """Add a blob to what is on disk now, under one lock, and return the result; forbidden changes write nothing.

        Raises:
            TimingCacheError: The file cannot be locked or written.
        """
        if not self._store.writable:
            return blob
        with self._store.locked():
            current = self._current(validate)
            merged = blob
            if current:
                try:
                    merged = combine(current, blob)
                except TimingCacheError as error:
                    self._store.set_aside("foreign", error.message.rstrip("."))
            self._write(merged, validate(merged))
        return merged

    def _current(self, validate: Validate) -> bytes:
        blob = self._store.read()
        if blob is None:
            return b""
        sidecar = read_sidecar(self.path)
        if sidecar is not None and (differences := sidecar.fingerprint.differences(self.fingerprint)):
            self._set_aside("foreign", f"it belongs to another machine or version: {differences}")
            return b""
        if not blob:
            self._set_aside("corrupt", "it is empty")
            return b""
        try:
            validate(blob)
        except TimingCacheError as error:
            self._set_aside("corrupt", error.message.rstrip("."))
            return b""
        if sidecar is None or sidecar.sha256 != sha256_bytes(blob):
            logger.info("%s was written by another program, or its sidecar is missing; the runtime takes it", self.path)
        return blob

    def _set_aside(self, kind: Literal["corrupt", "foreign"], reason: str) -> None:
        self._store.set_aside(kind, reason)
        sidecar_path(self.path).unlink(missing_ok=True)

    def _write(self, blob: bytes, entries: int) -> None:
        sidecar = Sidecar(
            fingerprint=self.fingerprint,
            sha256=sha256_bytes(blob),
            nbytes=len(blob),
            entries=entries,
            updated_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        atomic_write(self.path, blob)
        atomic_write(sidecar_path(self.path), sidecar.model_dump_json(indent=1))
