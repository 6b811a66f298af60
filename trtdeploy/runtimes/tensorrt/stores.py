"""Which cache files belong to this library on this GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trtdeploy.runtimes.config import BuildConfig
from trtdeploy.runtimes.tensorrt.bindings import Bindings
from trtdeploy.timing_cache import BlobCache, Fingerprint

if TYPE_CHECKING:
    from trtdeploy.cuda.device import Device


def timing_cache_of(bindings: Bindings, device: Device, config: BuildConfig) -> BlobCache | None:
    """Return the timing cache that a build is to use, if any."""
    if config.timing_cache is None:
        return None
    fingerprint = _fingerprint(bindings, device, "timing")
    return BlobCache(config.timing_cache, fingerprint, mode=config.timing_cache_mode)


def runtime_cache_of(bindings: Bindings, device: Device, path: Path) -> BlobCache:
    """Return the store of the kernels that TensorRT-RTX has compiled for this GPU."""
    return BlobCache(path, _fingerprint(bindings, device, "rtx-runtime"))


def _fingerprint(bindings: Bindings, device: Device, kind: Literal["timing", "rtx-runtime"]) -> Fingerprint:
    return Fingerprint(
        kind=kind,
        runtime=bindings.flavour.name,
        version=bindings.version,
        device=device.name,
        capability=device.capability,
        cuda=device.api.cuda_version,
    )
