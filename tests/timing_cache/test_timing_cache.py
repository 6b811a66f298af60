"""The timing cache: shared between builds, threads and processes; damaged ones are set aside."""

from __future__ import annotations

import json
import logging
import multiprocessing
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.onnx_graphs import batch_profile, block_network, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.errors import TimingCacheError
from trtdeploy.files import locked
from trtdeploy.plan import TacticFacts
from trtdeploy.runtimes.onnxruntime.building import builder
from trtdeploy.timing_cache import CacheMode, TimingCache
from trtdeploy.version import __version__

MERGE_FOR_EVER = """
import itertools, sys
from trtdeploy.timing_cache import TimingCache
from trtdeploy.version import __version__
cache = TimingCache(sys.argv[1])
for turn in itertools.count():
    cache.merge({f"{turn % 50}" + "x" * 2000: 1.0 + turn})
    print(turn, flush=True)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(block_network(channels=8), tmp_path / "m.onnx")


def tactic_of(
    source: Path,
    cache: Path,
    *,
    largest: int = 4,
    opt: int = 1,
    threads: int | None = None,
    mode: CacheMode = "update",
) -> TacticFacts:
    profile = batch_profile("input", largest, 3, 12, 12)
    profile["input"] = profile["input"].model_copy(update={"opt": (opt, 3, 12, 12)})
    config = BuildConfig(
        profiles=(profile,), timing_cache=cache, timing_cache_mode=mode, timing_rounds=1, threads=threads
    )
    tactic = build(source, source.with_suffix(".plan"), config).manifest.tactic
    assert tactic is not None
    return tactic


def test_the_second_build_uses_the_timings_of_the_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "b.timing"
    first = tactic_of(source, cache)
    assert not first.cached

    def never(*args: object, **options: object) -> None:
        pytest.fail("measured although all timings were in the cache")

    monkeypatch.setattr(builder, "median_milliseconds", never)
    second = tactic_of(source, cache)
    assert second.cached
    assert (second.name, second.threads, second.milliseconds) == (first.name, first.threads, first.milliseconds)


def test_verify_takes_all_timings_from_the_cache_or_fails_without_measuring(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "b.timing"
    first = tactic_of(source, cache)
    monkeypatch.setattr(builder, "median_milliseconds", lambda *_, **__: pytest.fail("measured in mode verify"))
    assert tactic_of(source, cache, mode="verify").milliseconds == first.milliseconds
    content = json.loads(cache.read_text())
    content["milliseconds"].popitem()
    cache.write_text(json.dumps(content))
    source.with_suffix(".plan").unlink()
    before = cache.read_bytes()
    with pytest.raises(TimingCacheError, match=r"lacks 1 of \d+ timings"):
        tactic_of(source, cache, mode="verify")
    with pytest.raises(TimingCacheError, match=r"lacks (\d+) of \1 timings"):
        tactic_of(source, tmp_path / "none.timing", mode="verify")
    assert not source.with_suffix(".plan").exists()
    assert cache.read_bytes() == before
    assert not (tmp_path / "none.timing").exists()


def test_read_only_measures_what_is_missing_and_changes_nothing(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "b.timing"
    tactic_of(source, cache)
    before = cache.read_bytes()
    assert tactic_of(source, cache, mode="read-only").cached
    assert not tactic_of(source, cache, mode="read-only", opt=2).cached
    assert cache.read_bytes() == before
    cache.write_bytes(b"broken")
    for mode in ("read-only", "verify"):
        with pytest.raises(TimingCacheError, match="leaves it as it is"):
            tactic_of(source, cache, mode=mode)
    assert cache.read_bytes() == b"broken"
    assert not list(tmp_path.glob("*.corrupt-*"))


def test_the_cache_decides_which_candidate_wins(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "b.timing"
    tactic_of(source, cache)
    content = json.loads(cache.read_text())
    slowest = max(content["milliseconds"], key=content["milliseconds"].__getitem__)
    content["milliseconds"][slowest] = 1e-6
    cache.write_text(json.dumps(content))
    tactic = tactic_of(source, cache)
    assert tactic.cached
    assert slowest.endswith(f"|{tactic.name}, {tactic.threads} thread{'s' if tactic.threads > 1 else ''}")


def test_another_model_shape_thread_count_or_version_is_measured_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "b.timing"
    assert not tactic_of(source, cache).cached
    assert not tactic_of(source, cache, opt=2).cached
    assert not tactic_of(source, cache, threads=5).cached
    assert not tactic_of(save(block_network(seed=1, channels=8), tmp_path / "other.onnx"), cache).cached
    monkeypatch.setattr(builder, "__version__", "0.0.0")
    assert not tactic_of(source, cache).cached
    monkeypatch.undo()
    monkeypatch.setattr(builder, "processor_name", lambda: "another processor")
    assert not tactic_of(source, cache).cached
    monkeypatch.undo()
    # the largest batch does not change what is measured; and nothing of the above has pushed the first timings out
    assert tactic_of(source, cache, largest=8).cached


def test_one_missing_timing_means_that_all_are_measured_side_by_side(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "b.timing"
    tactic_of(source, cache)
    content = json.loads(cache.read_text())
    for name in content["milliseconds"]:
        content["milliseconds"][name] = 1234.5
    del content["milliseconds"][name]
    cache.write_text(json.dumps(content))
    tactic = tactic_of(source, cache)
    assert not tactic.cached
    assert 1234.5 not in tactic.milliseconds.values()


WRITTEN = (
    b'{\n "format": 1,\n "milliseconds": {\n  "one": 1.0,\n  "two": 2.0\n },\n'
    b' "minor": 1,\n "written_by": "%s"\n}' % __version__.encode()
)


def test_that_is_how_a_cache_begins(tmp_path: Path) -> None:
    TimingCache(tmp_path / "b.timing").merge({"one": 1.0, "two": 2.0})
    assert (tmp_path / "b.timing").read_bytes() == WRITTEN


@pytest.mark.parametrize(
    "content",
    [
        WRITTEN[:-10],
        WRITTEN.replace(b"1.0", b"-1.0"),
        WRITTEN.replace(b"1.0", b"0"),
        WRITTEN.replace(b"1.0", b"NaN"),
        WRITTEN.replace(b"1.0", b"1e999"),
        WRITTEN.replace(b"1.0", b'"fast"'),
        WRITTEN.replace(b"two", b"\xff\xfe\x00"),
        WRITTEN[:45] + b"\0" * 500,
    ],
)
def test_a_damaged_timing_cache_is_set_aside_with_a_warning(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "b.timing"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert TimingCache(path).read() == {}
    assert "not a timing cache" in caplog.text
    assert "b.timing.corrupt-1" in caplog.text
    assert (tmp_path / "b.timing.corrupt-1").read_bytes() == content
    assert not path.exists()
    TimingCache(path).merge({"k": 2.0})
    assert TimingCache(path).read() == {"k": 2.0}


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"null",
        b"[]",
        b'{"format": 0, "milliseconds": {}}',
        b'{"milliseconds": {"a": 1}, "more": 1}',
        b'{"milliseconds": {"a": "fast"}}',
        b'{"milliseconds": {"a": NaN}}',
        b'{"milliseconds": {"a": 1e999}}',
        b'{"milliseconds": {"a": -1}}',
        b'{"milliseconds": {"a": 0}}',
        b'{"name": "my-package", "version": "1.0.0"}',
        b"\x00\xff\xfe binary",
        b"ftrt" + bytes(range(256)),
        b"[" * 100_000,
        b'{"milliseconds": ' * 20_000,
    ],
)
def test_a_file_that_is_no_timing_cache_is_refused_and_left(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "b.timing"
    path.write_bytes(content)
    for use in (TimingCache(path).read, lambda: TimingCache(path).merge({"k": 2.0})):
        with pytest.raises(TimingCacheError, match="not a timing cache"):
            use()
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("b.timing", content)]


def test_files_that_were_set_aside_earlier_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "b.timing"
    for number in (1, 2, 3):
        path.write_bytes(WRITTEN + b"%d" % number)
        TimingCache(path).merge({"k": float(number)})
    kept = [(tmp_path / f"b.timing.corrupt-{number}").read_bytes() for number in (1, 2, 3)]
    assert kept == [WRITTEN + b"1", WRITTEN + b"2", WRITTEN + b"3"]
    assert TimingCache(path).read() == {"k": 3.0}


def test_a_build_goes_on_with_a_damaged_cache_and_leaves_a_good_one(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "b.timing"
    cache.write_bytes(WRITTEN[:-3])
    assert not tactic_of(source, cache).cached
    assert "not a timing cache" in caplog.text
    assert tactic_of(source, cache).cached


@given(st.dictionaries(st.text(max_size=20), st.floats(1e-300, 1e300), max_size=5))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_merged_is_read_back(tmp_path: Path, timings: dict[str, float]) -> None:
    path = tmp_path / "b.timing"
    path.unlink(missing_ok=True)
    TimingCache(path).merge({"first": 1.0, **timings})
    TimingCache(path).merge({"second": 2.0})
    assert TimingCache(path).read() == {"first": 1.0, **timings, "second": 2.0}


def test_a_later_timing_replaces_an_earlier_one(tmp_path: Path) -> None:
    cache = TimingCache(tmp_path / "b.timing")
    cache.merge({"a": 1.0, "b": 1.0})
    cache.merge({"a": 2.0})
    assert cache.read() == {"a": 2.0, "b": 1.0}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_timing_is_refused_and_nothing_is_written(value: float, tmp_path: Path) -> None:
    cache = TimingCache(tmp_path / "b.timing")
    cache.merge({"good": 1.0})
    with pytest.raises(TimingCacheError, match="'bad'"):
        cache.merge({"fine": 1.0, "bad": value})
    assert cache.read() == {"good": 1.0}


def merge_fifty(path: Path, worker: int) -> None:
    for turn in range(50):
        TimingCache(path).merge({f"{worker}-{turn}": 1.0 + turn})


def test_four_processes_that_merge_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "b.timing"
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    processes = [context.Process(target=merge_fifty, args=(path, worker)) for worker in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * 4
    assert TimingCache(path).read() == {f"{w}-{t}": 1.0 + t for w in range(4) for t in range(50)}


def test_threads_that_merge_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "b.timing"
    cache = TimingCache(path)
    threads = [
        threading.Thread(target=lambda n=n: [cache.merge({f"{n}-{turn}": 1.0}) for turn in range(10)]) for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cache.read()) == 60


@pytest.mark.parametrize("merges", [1, 4, 9])
def test_a_killed_writer_leaves_a_whole_file_and_no_lock(merges: int, tmp_path: Path) -> None:
    path = tmp_path / "b.timing"
    with subprocess.Popen(
        [sys.executable, "-c", MERGE_FOR_EVER, str(path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        for _ in range(merges):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    timings = TimingCache(path, timeout_s=10).read()
    assert len(timings) >= merges
    assert not list(tmp_path.glob("*.corrupt-*"))
    TimingCache(path, timeout_s=10).merge({"after": 1.0})


def test_a_lock_that_is_not_given_back_in_time_is_an_error_that_names_the_file(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.timing"
    with locked(path):
        for use in (TimingCache(path, timeout_s=0.01).read, lambda: TimingCache(path, timeout_s=0.01).merge({"a": 1})):
            with pytest.raises(TimingCacheError, match=r"b\.timing stayed locked") as caught:
                use()
            assert caught.value.exit_code == 2
    assert TimingCache(path).read() == {}


def test_a_path_that_cannot_hold_a_file_is_an_error_not_a_traceback(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "b.timing",):
        for use in (TimingCache(path).read, lambda path=path: TimingCache(path).merge({"a": 1.0})):
            with pytest.raises(TimingCacheError, match="cannot be used"):
                use()
    with pytest.raises(TimingCacheError):
        tactic_of(source, tmp_path / "file" / "b.timing")
    assert not source.with_suffix(".plan").exists()


def test_a_folder_gets_a_file_for_the_runtime(source: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert not tactic_of(source, tmp_path / "folder").cached
    assert tactic_of(source, tmp_path / "folder").cached
    assert (tmp_path / "folder" / "onnxruntime.timing").is_file()


def test_a_full_disk_keeps_the_earlier_timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TimingCache(tmp_path / "b.timing")
    cache.merge({"a": 1.0})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(TimingCacheError, match="No space left"):
            cache.merge({"b": 2.0})
    assert cache.read() == {"a": 1.0}
