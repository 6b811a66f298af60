"""What a cache file is, told without the runtime that wrote it; and merging several into one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from trtdeploy.errors import TimingCacheError
from trtdeploy.files import sha256_bytes
from trtdeploy.timing_cache.blob import BlobCache, Fingerprint, Sidecar, read_sidecar
from trtdeploy.timing_cache.measured import MeasuredTimings, TimingCache

Health = Literal["ok", "corrupt", "no sidecar", "changed since its sidecar"]


class CacheFacts(BaseModel):
    """One cache file.

    Attributes:
        file: Its path.
        kind: "onnxruntime timings", "timing" (TensorRT's) or "rtx-runtime"; None where nothing says so.
        health: "no sidecar" is no fault: trtexec writes none.
        runtimes: Runtimes and versions that it belongs to.
        devices: Devices that it belongs to.
        entries: How many timings or tactics; None where nothing says so.
        nbytes: Its length.
        updated_at: When it was last written, UTC.
    """

    file: str
    kind: str | None
    health: Health
    runtimes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    entries: int | None = None
    nbytes: int
    updated_at: str


def cache_facts(path: Path) -> CacheFacts:
    """Look at a cache file; nothing is locked or changed.

    Raises:
        TimingCacheError: It cannot be read.
    """
    content = _read(path)
    written = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).isoformat(timespec="seconds")
    sidecar = read_sidecar(path)
    if sidecar is not None:
        intact = sidecar.sha256 == sha256_bytes(content)
        return CacheFacts(
            file=str(path),
            kind=sidecar.fingerprint.kind,
            health="ok" if intact else "changed since its sidecar",
            runtimes=(f"{sidecar.fingerprint.runtime} {sidecar.fingerprint.version}",),
            devices=(f"{sidecar.fingerprint.device} (cc {sidecar.fingerprint.capability})",),
            entries=sidecar.entries if intact else None,
            nbytes=len(content),
            updated_at=sidecar.updated_at if intact else written,
        )
    timings = _timings(content)
    if timings is not None:
        parts = [key.split("|") for key in timings]
        return CacheFacts(
            file=str(path),
            kind="onnxruntime timings",
            health="ok",
            runtimes=tuple(sorted({part[0].partition(", ")[2] for part in parts if len(part) > 1})),
            devices=tuple(sorted({part[1] for part in parts if len(part) > 1})),
            entries=len(timings),
            nbytes=len(content),
            updated_at=written,
        )
    # bytes of TensorRT without a sidecar look like anything else; text and emptiness do not look like them
    broken = not content or content.lstrip()[:1] in (b"{", b"[")
    return CacheFacts(
        file=str(path),
        kind=None,
        health="corrupt" if broken else "no sidecar",
        nbytes=len(content),
        updated_at=written,
    )


def merge_caches(paths: Sequence[Path], output: Path) -> CacheFacts:
    """Merge caches into ``output``, which may exist and is then merged, too; the inputs stay as they are.

    Raises:
        TimingCacheError: One cannot be read or is damaged, or they do not belong together.
        RuntimeUnavailableError: They are TensorRT's, and its library is not installed or cannot run here.
    """
    contents = {path: _read(path) for path in paths}
    timings = {path: _timings(content) for path, content in contents.items()}
    if all(timing is not None for timing in timings.values()):
        merged: dict[str, float] = {}
        for timing in timings.values():
            merged.update(timing or {})
        TimingCache(output).merge(merged)
        return cache_facts(output)
    sidecars = {path: _required_sidecar(path) for path in paths}
    fingerprint = _common_fingerprint(sidecars)
    if fingerprint.kind != "timing":
        raise TimingCacheError(
            "Runtime caches of TensorRT-RTX cannot be merged: it has no such operation.",
            hint="Keep one per deployment; it grows as the service sees new shapes.",
        )
    from trtdeploy.runtimes.tensorrt.timing import timing_blobs

    blobs = timing_blobs(fingerprint.runtime)
    cache = BlobCache(output, fingerprint)
    for path, content in contents.items():
        blobs.entries(content)  # garbage is refused before anything is written
        if path.resolve() != output.resolve():
            cache.merge(content, blobs.combine, blobs.entries)
    return cache_facts(cache.path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TimingCacheError(f"The timing cache {path} cannot be read: {error}.") from error


def _timings(content: bytes) -> dict[str, float] | None:
    try:
        return MeasuredTimings.model_validate_json(content).milliseconds
    except ValidationError:
        return None


def _required_sidecar(path: Path) -> Sidecar:
    sidecar = read_sidecar(path)
    if sidecar is None:
        raise TimingCacheError(
            f"Nothing says where the timing cache {path} comes from: it has no sidecar {path.name}.json.",
            hint="Use it in a build on its own machine first (--timing-cache), which writes one.",
        )
    return sidecar


def _common_fingerprint(sidecars: dict[Path, Sidecar]) -> Fingerprint:
    (first, sidecar), *others = sidecars.items()
    for path, other in others:
        if differences := other.fingerprint.differences(sidecar.fingerprint):
            raise TimingCacheError(
                f"The timing caches {first} and {path} do not belong together: {path.name} has {differences}.",
                hint="Merge caches of one runtime version on one kind of GPU only.",
            )
    return sidecar.fingerprint
