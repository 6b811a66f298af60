"""The kernels that TensorRT-RTX compiles, kept between processes; on objects that stand in for the library."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from trtdeploy.runtimes.tensorrt.execution.execution_contexts import RtxRuntimeCache
from trtdeploy.timing_cache import BlobCache, Fingerprint

OURS = Fingerprint(
    kind="rtx-runtime", runtime="tensorrt-rtx", version="1.7.1.116", device="A", capability="8.9", cuda="13.0"
)


class Cache:
    """Kernels by one byte each, behind a header of the library's version."""

    def __init__(self, version: bytes) -> None:
        self._version = version
        self.kernels = b""

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(self._version):
            return False
        self.kernels = blob[len(self._version) :]
        return True

    def serialize(self) -> bytes:
        return self._version + self.kernels


class Config:
    def __init__(self, version: bytes = b"1.7:") -> None:
        self._version = version
        self.attached: Cache | None = None

    def create_runtime_cache(self) -> Cache:
        return Cache(self._version)

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.attached = cache
        return True


def opened(path: Path, version: bytes = b"1.7:", fingerprint: Fingerprint = OURS) -> tuple[RtxRuntimeCache, Cache]:
    config: Any = Config(version)
    cache = RtxRuntimeCache(config, BlobCache(path, fingerprint))
    assert config.attached is not None
    return cache, config.attached


def test_what_was_compiled_is_there_the_next_time(tmp_path: Path) -> None:
    cache, kernels = opened(tmp_path / "r.cache")
    assert kernels.kernels == b""
    kernels.kernels = b"abc"
    cache.save()
    assert opened(tmp_path / "r.cache")[1].kernels == b"abc"


def test_what_the_library_refuses_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "r.cache"
    cache, kernels = opened(path)
    kernels.kernels = b"abc"
    cache.save()
    with caplog.at_level(logging.WARNING):
        renewed, fresh = opened(path, b"1.8:")
    assert fresh.kernels == b""
    assert "set aside" in caplog.text
    renewed.save()
    assert opened(path, b"1.8:")[1].kernels == b""


def test_a_cache_of_another_gpu_is_not_even_shown_to_the_library(tmp_path: Path) -> None:
    path = tmp_path / "r.cache"
    cache, kernels = opened(path)
    kernels.kernels = b"abc"
    cache.save()
    other = OURS.model_copy(update={"device": "B"})
    assert opened(path, fingerprint=other)[1].kernels == b""
    assert (tmp_path / "r.cache.foreign-1").exists()
