"""TensorRT's own timing cache: attached, merged and verified; on a library that stands in for it."""

from __future__ import annotations

import enum
import json
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.onnx_graphs import block_network, save
from trtdeploy.errors import BuildError, TimingCacheError
from trtdeploy.onnxgraph.reading.source import SourceModel, load_source
from trtdeploy.plan import DeviceFacts
from trtdeploy.runtimes.config import BuildConfig
from trtdeploy.runtimes.tensorrt.bindings import FLAVOURS, Bindings
from trtdeploy.runtimes.tensorrt.building import builder
from trtdeploy.runtimes.tensorrt.building.progress import Cancellation
from trtdeploy.runtimes.tensorrt.building.timing import TimingBlobs
from trtdeploy.runtimes.tensorrt.messages import Messages
from trtdeploy.timing_cache import BlobCache, Fingerprint

FINGERPRINT = Fingerprint(
    kind="timing", runtime="tensorrt", version="10.16.1.11", device="Fake GPU", capability="9.0", cuda="13.0"
)
# TensorRT-RTX 1.7.1, libtensorrt_rtx.so
MISS = "Adding new entry to timing cache is not allowed if `BuilderFlag::kERROR_ON_TIMING_CACHE_MISS` is set."


class Library:
    """A TensorRT that times tactics by their names. Its caches are JSON: device and tactics.

    Args:
        device: UUID of the board; two boards of one model have two.

    Attributes:
        module: Stands where ``tensorrt`` would.
        timed: Tactics that a build had to time.
        complaints: What a build says before it fails.
    """

    def __init__(self, device: str = "gpu-0") -> None:
        self.timed: list[str] = []
        self.complaints: list[str] = []
        self.tactics = ["conv/a", "conv/b", "gemm/a"]
        library = self
        trt: Any = ModuleType("fake_builder")
        self.module = trt

        class ILogger:
            Severity = enum.IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)

        class BuilderFlag(enum.Enum):
            EDITABLE_TIMING_CACHE, ERROR_ON_TIMING_CACHE_MISS, DISABLE_COMPILATION_CACHE = range(3)

        class ITimingCache:
            def __init__(self, device: str, tactics: dict[str, float]) -> None:
                self.device, self.tactics = device, tactics

            def serialize(self) -> bytes:
                return json.dumps({"device": self.device, "tactics": self.tactics}).encode()

            def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
                if input_cache.device != self.device and not ignore_mismatch:
                    return False
                self.tactics = {**input_cache.tactics, **self.tactics}
                return True

            def queryKeys(self) -> list[str]:
                return list(self.tactics)

        class IBuilderConfig:
            def __init__(self, logger: Any) -> None:
                self._logger = logger
                self.flags: set[BuilderFlag] = set()
                self.cache: ITimingCache | None = None

            def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
                if not serialized_timing_cache:
                    return ITimingCache(device, {})
                try:
                    content = json.loads(serialized_timing_cache)
                    return ITimingCache(content["device"], content["tactics"])
                except (ValueError, KeyError):
                    # as the real one: no exception, an empty cache and a warning
                    words = "Failed to deserialize timing cache. Returning an empty timing cache."
                    self._logger.log(ILogger.Severity.WARNING, words)
                    return ITimingCache(device, {})

            def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
                if cache.device != device and not ignore_mismatch:
                    return False
                self.cache = cache
                return True

            def set_flag(self, flag: BuilderFlag) -> None:
                self.flags.add(flag)

        class Builder:
            def __init__(self, logger: Any) -> None:
                self._logger = logger

            def create_builder_config(self) -> IBuilderConfig:
                return IBuilderConfig(self._logger)

            def build_serialized_network(self, network: object, config: IBuilderConfig) -> bytes | None:
                for words in library.complaints:
                    self._logger.log(ILogger.Severity.ERROR, words)
                if library.complaints:
                    return None
                for tactic in library.tactics:
                    if config.cache is not None and tactic not in config.cache.tactics:
                        if BuilderFlag.ERROR_ON_TIMING_CACHE_MISS in config.flags:
                            assert BuilderFlag.EDITABLE_TIMING_CACHE in config.flags
                            self._logger.log(ILogger.Severity.ERROR, MISS)
                            return None
                        library.timed.append(tactic)
                        config.cache.tactics[tactic] = 1.0
                return b"plan"

        for value in (ILogger, BuilderFlag, ITimingCache, IBuilderConfig, Builder):
            setattr(trt, value.__name__, value)
        self.bindings = Bindings(FLAVOURS["tensorrt"], trt, "10.16.1.11", Messages(trt))

    def build(self, source: SourceModel, cache: Path, mode: Any = "update") -> bytes:
        """The part of a build that the timing cache is about, between parsing and the plan."""
        config = BuildConfig(runtime="tensorrt", timing_cache=cache, timing_cache_mode=mode)
        target = builder.Target(
            device=DeviceFacts(kind="gpu", name="Fake GPU", capability="9.0"),
            obstacle=None,
            cache=BlobCache(cache, FINGERPRINT, mode=mode),
        )
        blobs = TimingBlobs(self.bindings)
        maker: Any = self.module.Builder(self.bindings.messages.logger)
        builder_config = maker.create_builder_config()
        with self.bindings.messages.capture() as capture:
            timing = builder._attach_timing_cache(self.bindings, builder_config, config, target, blobs)
            parsed: Any = type("Parsed", (), {"builder": maker, "network": None})()
            content = builder._compile(
                self.bindings,
                parsed,
                builder_config,
                config,
                parsed,
                Cancellation(),
                capture,
                source,
                None,
            )
            assert timing is not None
            assert target.cache is not None
            target.cache.merge(bytes(timing.serialize()), blobs.combining(target.cache), blobs.entries)
        return content


@pytest.fixture
def source(tmp_path: Path) -> SourceModel:
    return load_source(save(block_network(channels=8), tmp_path / "m.onnx"))


def test_a_second_build_times_nothing_and_a_sidecar_says_whose_it_is(source: SourceModel, tmp_path: Path) -> None:
    cache = tmp_path / "b.timing"
    first, second = Library(), Library()
    first.build(source, cache)
    second.build(source, cache)
    assert (len(first.timed), second.timed) == (3, [])
    sidecar = json.loads((tmp_path / "b.timing.json").read_text())
    assert sidecar["fingerprint"]["version"] == "10.16.1.11"
    assert sidecar["entries"] == 3


def test_what_another_build_added_meanwhile_is_kept(source: SourceModel, tmp_path: Path) -> None:
    cache = tmp_path / "b.timing"
    first, second = Library(), Library()
    second.tactics = ["other/a"]
    blobs = TimingBlobs(first.bindings)
    first.build(source, cache)
    second.build(source, cache)
    assert blobs.entries(cache.read_bytes()) == 4


def test_verify_builds_from_a_complete_cache_and_fails_on_a_miss(source: SourceModel, tmp_path: Path) -> None:
    cache = tmp_path / "b.timing"
    Library().build(source, cache)
    assert Library().build(source, cache, "verify") == b"plan"
    more = Library()
    more.tactics.append("new/a")
    before = cache.read_bytes()
    with pytest.raises(TimingCacheError, match="verify") as caught:
        more.build(source, cache, "verify")
    assert caught.value.log_lines == (MISS,)
    assert cache.read_bytes() == before


@pytest.mark.parametrize("mode", ["update", "verify"])
def test_another_failure_is_not_called_a_miss(source: SourceModel, tmp_path: Path, mode: str) -> None:
    cache = tmp_path / "b.timing"
    Library().build(source, cache)
    failing = Library()
    failing.complaints = ["the timing cache is in use", "conv: the permission is missing"]
    with pytest.raises(BuildError, match="the permission is missing"):
        failing.build(source, cache, mode)


def test_a_miss_is_one_only_where_it_is_forbidden(source: SourceModel, tmp_path: Path) -> None:
    failing = Library()
    failing.complaints = ["timing cache miss: conv is timed", "Error Code 10: no implementation for conv"]
    with pytest.raises(BuildError, match="no implementation for conv"):
        failing.build(source, tmp_path / "b.timing", "update")


def test_verify_without_a_cache_fails_at_once(source: SourceModel, tmp_path: Path) -> None:
    with pytest.raises(TimingCacheError, match="no timing cache"):
        Library().build(source, tmp_path / "none.timing", "verify")


@pytest.mark.parametrize("content", [b"garbage", b'{"device": "gpu-0"'])
def test_what_the_library_takes_silently_as_empty_is_refused_and_left(
    source: SourceModel, tmp_path: Path, content: bytes
) -> None:
    cache = tmp_path / "b.timing"
    cache.write_bytes(content)
    with pytest.raises(TimingCacheError, match="leaves it as it is"):
        Library().build(source, cache)
    assert cache.read_bytes() == content
    assert not list(tmp_path.glob("*corrupt*"))


@pytest.mark.parametrize("content", [b"", b"garbage", b'{"device": "gpu-0"'])
def test_what_the_library_takes_silently_as_empty_is_noticed(
    source: SourceModel, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "b.timing"
    Library().build(source, cache)
    cache.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        Library().build(source, cache)
    assert (tmp_path / "b.timing.corrupt-1").read_bytes() == content
    assert any("set aside" in record.message for record in caplog.records)
    assert TimingBlobs(Library().bindings).entries(cache.read_bytes()) == 3


def test_read_only_leaves_a_bad_file_and_says_so(source: SourceModel, tmp_path: Path) -> None:
    cache = tmp_path / "b.timing"
    cache.write_bytes(b"garbage")
    with pytest.raises(TimingCacheError):
        Library().build(source, cache, "read-only")
    assert cache.read_bytes() == b"garbage"


def test_read_only_uses_it_and_changes_nothing(source: SourceModel, tmp_path: Path) -> None:
    cache = tmp_path / "b.timing"
    Library().build(source, cache)
    before = cache.read_bytes()
    more = Library()
    more.tactics.append("new/a")
    more.build(source, cache, "read-only")
    assert more.timed == ["new/a"]
    assert cache.read_bytes() == before


def test_a_cache_of_trtexec_that_the_library_refuses_is_left(source: SourceModel, tmp_path: Path) -> None:
    cache = tmp_path / "b.timing"
    Library("gpu-1").build(source, cache)
    (tmp_path / "b.timing.json").unlink()  # trtexec made it: nothing says that it was a board of the same model
    before = cache.read_bytes()
    for mode in ("update", "read-only"):
        library = Library("gpu-0")
        with pytest.raises(TimingCacheError, match="another device"):
            library.build(source, cache, mode)
        assert library.timed == []
    assert cache.read_bytes() == before
    assert not list(tmp_path.glob("*foreign*"))


def test_another_board_of_the_same_model_uses_it(source: SourceModel, tmp_path: Path) -> None:
    cache = tmp_path / "b.timing"
    Library("gpu-1").build(source, cache)
    other = Library("gpu-0")
    other.tactics.append("new/a")
    other.build(source, cache)
    assert other.timed == ["new/a"]
    again = Library("gpu-1")
    again.tactics.append("new/a")
    assert again.build(source, cache, "verify") == b"plan"
    assert list(tmp_path.glob("*foreign*")) == []


def test_boards_of_the_same_model_add_to_one_file_at_the_same_time(source: SourceModel, tmp_path: Path) -> None:
    cache = tmp_path / "b.timing"
    first = Library("gpu-0")
    first.tactics = ["first/a"]
    store = BlobCache(cache, FINGERPRINT)
    blobs = TimingBlobs(first.bindings)
    first.build(source, cache)
    # the other board began when there was no file
    store.merge(json.dumps({"device": "gpu-1", "tactics": {"second/a": 1.0}}).encode(), blobs.combining(store), len)
    assert blobs.entries(cache.read_bytes()) == 2


def test_a_cache_of_another_fingerprint_is_set_aside_and_the_build_goes_on(source: SourceModel, tmp_path: Path) -> None:
    cache = tmp_path / "b.timing"
    Library().build(source, cache)
    other = FINGERPRINT.model_copy(update={"capability": "8.9"})
    content = json.loads((tmp_path / "b.timing.json").read_text())
    content["fingerprint"] = other.model_dump()
    (tmp_path / "b.timing.json").write_text(json.dumps(content))
    library = Library()
    library.build(source, cache)
    assert len(library.timed) == 3
    assert (tmp_path / "b.timing.foreign-1").exists()


def test_caches_that_do_not_belong_together_are_not_combined() -> None:
    library = Library()
    ours, theirs = (json.dumps({"device": device, "tactics": {device: 1.0}}).encode() for device in ("gpu-0", "gpu-1"))
    with pytest.raises(TimingCacheError, match="refuses to combine"):
        TimingBlobs(library.bindings).combine(ours, theirs)


def test_a_folder_keeps_one_file_per_machine(source: SourceModel, tmp_path: Path) -> None:
    (tmp_path / "caches").mkdir()
    Library().build(source, tmp_path / "caches")
    names = {path.name for path in (tmp_path / "caches").glob("*.timing")}
    assert names == {"tensorrt-10.16.1.11-Fake_GPU-cc9.0-cuda13.0.timing"}
