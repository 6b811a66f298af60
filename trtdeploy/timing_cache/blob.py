"""A cache in the runtime's own bytes, with a sidecar that says whose it is.

The file holds nothing but the runtime's bytes, so that ``trtexec --timingCacheFile`` shares it. TensorRT does not say
where a cache comes from, and takes garbage silently as empty: the sidecar ``<file>.json`` has fingerprint and digest.

Bytes that the sidecar does not vouch for come from another program, or were damaged. They are taken if the runtime
takes them. If it does not, what has a sidecar is set aside; what has none may be anything, and is refused untouched.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from trtdeploy.errors import TimingCacheError
from trtdeploy.files import atomic_write, atomic_writer, sha256_bytes
from trtdeploy.timing_cache.measured import parse_measured
from trtdeploy.timing_cache.sidecar import (
    Fingerprint,
    Sidecar,
    is_sidecar,
    parse_sidecar,
    read_pair,
    read_sidecar_bytes,
    sidecar_path,
)
from trtdeploy.timing_cache.store import AsideKind, CacheMode, CacheStore, logger, place

Validate = Callable[[bytes], int]
"""Returns the number of entries of a blob; raises ``TimingCacheError`` for what the runtime does not take."""
Combine = Callable[[bytes, bytes], bytes]
"""Returns the first blob with what the second adds; raises ``TimingCacheError`` if they do not belong together."""


class BlobCache:
    """The cache of one runtime on one machine.

    Args:
        path: The file, which need not exist yet; in a folder (one that exists, or a text that ends in a separator),
            the file named for the fingerprint.
        fingerprint: What it has to belong to.
        mode: Whether it may be changed; see ``CacheStore``.
        timeout_s: How long to wait for the lock.
    """

    def __init__(
        self, path: str | Path, fingerprint: Fingerprint, *, mode: CacheMode = "update", timeout_s: float = 60.0
    ) -> None:
        self.path = place(path, fingerprint.file_name)
        self.fingerprint = fingerprint
        self.mode = mode
        self._sidecar_path = sidecar_path(self.path)
        self._store = CacheStore(
            self.path, mode=mode, timeout_s=timeout_s, sidecar=self._sidecar_path, shared_with_trtexec=True
        )

    def load(self, validate: Validate) -> bytes:
        """Return the blob, or nothing where there is none. A cache of trtdeploy's that cannot be used is set aside.

        Raises:
            TimingCacheError: The file cannot be locked or read; or it is no timing cache, or one that cannot be used
                and the mode forbids to set it aside; or the mode is "verify" and there is none.
        """
        with self._store.access(lambda: self._refuse_foreign(validate)):
            blob, _ = self._current(validate)
        if not blob and self.mode == "verify":
            raise TimingCacheError(
                f"There is no timing cache at {self.path} to verify a build by.",
                hint="Build once with --timing-cache-mode update.",
            )
        if not blob and self.mode == "read-only":
            logger.warning("there is no timing cache at %s; mode 'read-only' makes none", self.path)
        return blob

    def vouches_for(self, blob: bytes) -> bool:
        """Say whether a sidecar lies here that knows these bytes, and names this version and kind of device."""
        sidecar = parse_sidecar(self.path, read_sidecar_bytes(self.path))
        return (
            sidecar is not None and sidecar.vouches_for(blob) and not sidecar.fingerprint.differences(self.fingerprint)
        )

    def refuse(self, reason: str) -> None:
        """Set the file aside because the runtime does not want it on this device after all.

        Raises:
            TimingCacheError: The file cannot be locked, has no sidecar, or the mode forbids to set it aside.
        """
        with self._store.access(lambda: None):
            if self.path.exists():
                self._set_aside("foreign", reason)

    def merge(self, blob: bytes, combine: Combine, validate: Validate) -> bytes:
        """Add a blob to what is on disk now, under one lock, and return the result; forbidden changes write nothing.

        When it returns, the result is on disk and survives a power cut. On an error, files are as they were.

        Raises:
            TimingCacheError: The file cannot be locked or written, is no timing cache, or the runtime does not take
                the result.
        """
        if not self._store.writable:
            return blob
        with self._store.access(lambda: self._refuse_foreign(validate)):
            current, sidecar = self._current(validate)
            if not blob:
                return current  # no runtime makes a cache of no bytes, and a file of none would be taken for damage
            merged = blob
            if current:
                try:
                    merged = combine(current, blob)
                except TimingCacheError as error:
                    self._set_aside("foreign", error.message.rstrip("."))
                    current = b""
            if sidecar is None or sidecar.sha256 != sha256_bytes(merged) or merged != current:
                self._write(merged, validate(merged), previous=current)
        return merged

    def _refuse_foreign(self, validate: Validate) -> None:
        """Refuse a file, or one at the sidecar's place, that neither trtdeploy has written nor the runtime takes."""
        beside = read_sidecar_bytes(self.path)
        if beside is not None and not is_sidecar(self.path, beside):
            raise self._store.refusal(f"its sidecar would replace {self._sidecar_path}, which is something else")
        blob, _ = read_pair(self.path)
        if blob and beside is None and parse_measured(self.path, blob) is None:
            try:
                validate(blob)
            except TimingCacheError as error:
                raise self._store.refusal(error.message.rstrip(".")) from error

    def _current(self, validate: Validate) -> tuple[bytes, Sidecar | None]:
        """Return what is on disk with the sidecar that vouches for it, or nothing, having set it aside."""
        blob, sidecar = read_pair(self.path)
        if blob is None:
            return b"", None
        if not blob:
            if sidecar is not None or not self._store.writable:
                self._set_aside("corrupt", "it is empty")
            return b"", None
        if sidecar is not None and not sidecar.vouches_for(blob):
            sidecar = None
        if sidecar is not None and (differences := sidecar.fingerprint.differences(self.fingerprint)):
            self._set_aside("foreign", f"it belongs to another machine or version: {differences}")
            return b"", None
        if sidecar is None and parse_measured(self.path, blob) is not None:
            self._store.set_aside("foreign", "it holds tactics that were measured with ONNX Runtime")
            return b"", None
        try:
            validate(blob)
        except TimingCacheError as error:
            self._set_aside("corrupt", error.message.rstrip("."))
            return b"", None
        if sidecar is None:
            logger.info("%s was written by another program, or its sidecar is missing; the runtime takes it", self.path)
        return blob, sidecar

    def _set_aside(self, kind: AsideKind, reason: str) -> None:
        if self._store.writable and not is_sidecar(self.path, read_sidecar_bytes(self.path)):
            raise self._store.refusal(reason)
        self._store.set_aside(kind, reason, sidecar=self._sidecar_path)

    def _write(self, blob: bytes, entries: int, *, previous: bytes) -> None:
        sidecar = Sidecar(
            fingerprint=self.fingerprint,
            sha256=sha256_bytes(blob),
            previous_sha256=sha256_bytes(previous) if previous else None,
            nbytes=len(blob),
            entries=entries,
            updated_at=datetime.now(timezone.utc).replace(microsecond=0),
        )
        before = read_sidecar_bytes(self.path)
        if before is not None and parse_sidecar(self.path, before) is None:
            self._store.clear_sidecar_place()
            before = None
        try:
            with atomic_writer(self.path) as stream:
                stream.write(blob)
                stream.flush()
                os.fsync(stream.fileno())  # a full disk shows here, before anything gets its name
                atomic_write(self._sidecar_path, sidecar.model_dump_json(indent=1))
        except BaseException:
            if self._store.read() != blob:
                self._restore_sidecar(before)
            raise

    def _restore_sidecar(self, before: bytes | None) -> None:
        """Put the sidecar back. Where that fails, too, the new one still names the digest of the old blob."""
        with suppress(OSError):
            if before is None:
                self._sidecar_path.unlink(missing_ok=True)
            elif read_sidecar_bytes(self.path) != before:
                atomic_write(self._sidecar_path, before)
