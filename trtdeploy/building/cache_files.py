"""What a cache file is, told without the runtime that wrote it; and merging several into one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from trtdeploy.errors import TimingCacheError
from trtdeploy.files import sha256_bytes
from trtdeploy.timing_cache.blob import BlobCache
from trtdeploy.timing_cache.measured import TimingCache, parse_measured
from trtdeploy.timing_cache.sidecar import Fingerprint, Sidecar, read_pair

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
    content, sidecar = _read(path)
    written = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).isoformat(timespec="seconds")
    timings = parse_measured(path, content)
    vouched = sidecar is not None and sidecar.vouches_for(content)
    if timings is not None and not vouched:
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
    if sidecar is not None and content:
        latest = sidecar.sha256 == sha256_bytes(content)
        counted = latest and sidecar.fingerprint.kind == "timing"
        return CacheFacts(
            file=str(path),
            kind=sidecar.fingerprint.kind,
            health="ok" if vouched else "changed since its sidecar",
            runtimes=(f"{sidecar.fingerprint.runtime} {sidecar.fingerprint.version}",),
            devices=(f"{sidecar.fingerprint.device} (cc {sidecar.fingerprint.capability})",),
            entries=sidecar.entries if counted else None,
            nbytes=len(content),
            updated_at=sidecar.updated_at.isoformat(timespec="seconds") if latest else written,
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
    """Merge caches into ``output``, which may exist and is then merged, too; on an error all files are as they were.

    Of measured timings of the same key the last one counts; TensorRT keeps the first.

    Raises:
        TimingCacheError: One cannot be read or is damaged, or they do not belong together.
        RuntimeUnavailableError: They are TensorRT's, and its library is not installed or cannot run here.
    """
    inputs = [output, *paths] if output.exists() else [*paths]
    unique: dict[Path, Path] = {}
    for path in inputs:
        unique.setdefault(path.resolve(), path)
    pairs = {path: _read(path) for path in unique.values()}
    timings = {path: parse_measured(path, content) for path, (content, _) in pairs.items()}
    if all(timing is not None for timing in timings.values()):
        merged: dict[str, float] = {}
        for timing in timings.values():
            merged.update(timing or {})
        TimingCache(output).merge(merged)
        return cache_facts(output)
    fingerprint = _common_fingerprint({path: _required_sidecar(path, *pair) for path, pair in pairs.items()})
    if fingerprint.kind != "timing":
        raise TimingCacheError(
            "Runtime caches of TensorRT-RTX cannot be merged: it has no such operation.",
            hint="Keep one per deployment; it grows as the service sees new shapes.",
        )
    from trtdeploy.runtimes.tensorrt.building.timing import timing_blobs

    blobs = timing_blobs(fingerprint.runtime)
    combined = b""
    for content, _ in pairs.values():
        blobs.entries(content)  # garbage is refused before anything is written
        # before the output is touched: a refusal there would set it aside, as in a build
        combined = blobs.combine(combined, content, ignore_mismatch=True) if combined else content
    cache = BlobCache(output, fingerprint)
    cache.merge(combined, blobs.combining(cache), blobs.entries)
    return cache_facts(cache.path)


def _read(path: Path) -> tuple[bytes, Sidecar | None]:
    try:
        if path.exists() and not path.is_file():
            raise TimingCacheError(f"The timing cache {path} cannot be read: it is no regular file.")
        content, sidecar = read_pair(path)
    except OSError as error:
        raise TimingCacheError(f"The timing cache {path} cannot be read: {error}.") from error
    if content is None:
        raise TimingCacheError(f"The timing cache {path} cannot be read: there is no such file.")
    return content, sidecar


def _required_sidecar(path: Path, content: bytes, sidecar: Sidecar | None) -> Sidecar:
    if sidecar is None or not sidecar.vouches_for(content):
        lack = f"it has no sidecar {path.name}.json" if sidecar is None else "its sidecar describes other bytes"
        raise TimingCacheError(
            f"Nothing says where the timing cache {path} comes from: {lack}.",
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
