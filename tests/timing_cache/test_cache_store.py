"""The store of blobs: whose they are, who may change them, what happens to bad ones, and who shares the lock."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from trtdeploy.building.cache_files import cache_facts, merge_caches
from trtdeploy.errors import TimingCacheError
from trtdeploy.files import locked
from trtdeploy.timing_cache import BlobCache, CacheMode, Fingerprint, TimingCache
from trtdeploy.timing_cache.sidecar import read_pair

OURS = Fingerprint(
    kind="timing", runtime="tensorrt", version="10.16.1.11", device="NVIDIA L4", capability="8.9", cuda="13.0"
)
THEIRS = OURS.model_copy(update={"version": "10.3.0.26", "capability": "9.0"})
HOLD_AS_TRTEXEC = """
import fcntl, sys, time
file = open(sys.argv[1], "wb+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""
TRY_AS_TRTEXEC = """
import fcntl, sys
file = open(sys.argv[1], "wb+")
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(1)
"""


def entries(blob: bytes) -> int:
    """A library whose caches are words after a magic; the last byte says that nothing is cut off."""
    if not (blob.startswith(b"magic ") and blob.endswith(b".")):
        raise TimingCacheError(f"The library does not take these {len(blob)} bytes.")
    return len(blob[6:-1].split())


def cache_of(*words: str) -> bytes:
    return b"magic " + " ".join(sorted(words)).encode() + b"."


def words_in(blob: bytes) -> set[str]:
    return set(blob[6:-1].decode().split())


def combine(first: bytes, second: bytes, *, ignore_mismatch: bool = False) -> bytes:
    union = words_in(first) | words_in(second)
    if {"gpu-a", "gpu-b"} <= union:
        raise TimingCacheError("The library refuses to combine gpu-a with gpu-b.")
    return cache_of(*union)


def write(path: Path, *words: str, fingerprint: Fingerprint = OURS) -> None:
    BlobCache(path, fingerprint).merge(cache_of(*words), combine, entries)


def load(path: Path, mode: CacheMode = "update", fingerprint: Fingerprint = OURS) -> bytes:
    return BlobCache(path, fingerprint, mode=mode, timeout_s=5).load(entries)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".lock")}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "b.timing"


def test_the_file_holds_the_blob_and_nothing_else_and_the_sidecar_says_whose_it_is(path: Path) -> None:
    write(path, "one", "two")
    assert path.read_bytes() == cache_of("one", "two")
    sidecar = json.loads((path.parent / "b.timing.json").read_text())
    assert sidecar["fingerprint"] == OURS.model_dump()
    assert (sidecar["entries"], sidecar["nbytes"]) == (2, path.stat().st_size)
    write(path, "three")
    assert words_in(load(path)) == {"one", "two", "three"}


@pytest.mark.parametrize(
    "content", [b"", b"garbage", cache_of("one", "two")[:-4], b"\0" * 5000], ids=["empty", "garbage", "cut", "zeros"]
)
def test_what_the_runtime_does_not_take_is_set_aside_and_the_build_goes_on(
    content: bytes, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(path, "one", "two")
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert load(path) == b""
    assert "b.timing.corrupt-1" in caplog.text
    assert (path.parent / "b.timing.corrupt-1").read_bytes() == content
    assert (path.parent / "b.timing.corrupt-1.json").exists()
    assert not (path.parent / "b.timing.json").exists()
    write(path, "new")
    assert words_in(load(path)) == {"new"}


def test_a_cache_of_another_machine_is_set_aside_with_its_sidecar_and_the_fields_are_named(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(path, "theirs", fingerprint=THEIRS)
    before = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        write(path, "ours")
    assert "version '10.3.0.26', expected '10.16.1.11', capability '9.0', expected '8.9'" in caplog.text
    assert words_in(load(path)) == {"ours"}
    # what was set aside can still be used on its own machine
    aside = path.parent / "b.timing.foreign-1"
    assert aside.read_bytes() == before
    assert load(aside, "read-only", THEIRS) == before
    assert cache_facts(aside).health == "ok"


@pytest.mark.parametrize("mode", ["read-only", "verify"])
@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_other_modes_leave_a_bad_file_and_say_what_to_do(mode: CacheMode, content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(TimingCacheError, match="leaves it as it is; use another file"):
        load(path, mode)
    assert snapshot(path.parent) == {"b.timing": content}


@pytest.mark.parametrize("mode", ["read-only", "verify"])
def test_other_modes_name_the_fields_that_differ(mode: CacheMode, path: Path) -> None:
    write(path, "theirs", fingerprint=THEIRS)
    before = snapshot(path.parent)
    with pytest.raises(TimingCacheError, match=r"version '10\.3\.0\.26', expected '10\.16\.1\.11'"):
        load(path, mode)
    assert snapshot(path.parent) == before


@pytest.mark.parametrize("mode", ["read-only", "verify"])
def test_other_modes_leave_no_trace_not_even_a_lock(mode: CacheMode, path: Path, tmp_path: Path) -> None:
    write(path, "one")
    for lock in tmp_path.glob("*.lock"):
        lock.unlink()
    (tmp_path / ".b.timing.lock").unlink(missing_ok=True)
    before = {entry.name: entry.stat().st_mtime_ns for entry in tmp_path.iterdir()}
    assert words_in(load(path, mode)) == {"one"}
    assert BlobCache(path, OURS, mode=mode).merge(cache_of("two"), combine, entries) == cache_of("two")
    assert {entry.name: entry.stat().st_mtime_ns for entry in tmp_path.iterdir()} == before
    missing = tmp_path / "none" / "b.timing"
    if mode == "read-only":
        assert load(missing, mode) == b""
        assert TimingCache(missing, mode=mode).read() == {}
    else:
        with pytest.raises(TimingCacheError, match="no timing cache"):
            load(missing, mode)
    assert not missing.parent.exists()


def test_bytes_that_another_program_wrote_are_taken_if_the_runtime_takes_them(path: Path) -> None:
    write(path, "ours")
    path.write_bytes(cache_of("ours", "trtexec"))
    assert words_in(load(path)) == {"ours", "trtexec"}
    write(path, "more")
    assert words_in(load(path, "verify")) == {"ours", "trtexec", "more"}
    assert cache_facts(path).health == "ok"
    (path.parent / "b.timing.json").unlink()
    assert words_in(load(path)) == {"ours", "trtexec", "more"}


def test_a_sidecar_says_nothing_about_other_bytes_than_its_own(path: Path) -> None:
    # as a kill leaves it that hits between setting a foreign blob aside and its sidecar
    write(path, "theirs", fingerprint=THEIRS)
    path.write_bytes(cache_of("ours"))
    assert words_in(load(path)) == {"ours"}
    assert not list(path.parent.glob("*.foreign-*"))


def test_what_does_not_combine_is_set_aside_and_the_new_blob_is_kept(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(path, "gpu-a")
    with caplog.at_level(logging.WARNING):
        write(path, "gpu-b")
    assert "refuses to combine" in caplog.text
    assert words_in(load(path)) == {"gpu-b"}
    assert words_in((path.parent / "b.timing.foreign-1").read_bytes()) == {"gpu-a"}


@pytest.mark.parametrize("earlier", [None, cache_of("trtexec")], ids=["alone", "beside a cache"])
def test_a_file_that_only_has_the_name_of_the_sidecar_is_refused_and_nothing_is_touched(
    path: Path, earlier: bytes | None
) -> None:
    (path.parent / "b.timing.json").write_text('{"a": "manifest"}')
    if earlier is not None:
        path.write_bytes(earlier)
    before = {entry.name: entry.read_bytes() for entry in path.parent.iterdir()}
    for use in (lambda: load(path), lambda: write(path, "one")):
        with pytest.raises(TimingCacheError, match=r"sidecar would replace .*b\.timing\.json"):
            use()
    assert {entry.name: entry.read_bytes() for entry in path.parent.iterdir()} == before


def test_a_damaged_sidecar_is_set_aside(path: Path) -> None:
    write(path, "one")
    sidecar = path.parent / "b.timing.json"
    damaged = sidecar.read_text()[:-30]
    sidecar.write_text(damaged)
    write(path, "two")
    assert words_in(load(path)) == {"one", "two"}
    assert (path.parent / "b.timing.json.corrupt-1").read_text() == damaged


OTHER_FILES = {
    "onnx": b"\x08\x09\x3a\x10" + b"a model" * 30,
    "ranges": b"TRT-8401-EntropyCalibration2\nx: 3caa54fc\n",
    "manifest": b'{\n "format": 1,\n "trtdeploy_version": "1"\n}',
    "sidecar": b'{\n "format": 1,\n "fingerprint": {\n  "kind": "timing"\n }\n}',
    "newer": b'{\n "format": 2,\n "milliseconds": {}\n}',
    "json": b'{"name": "my-package"}',
    "zeros": b"\0" * 5000,
    "text": b"hello",
}


@pytest.mark.parametrize("mode", ["update", "read-only", "verify"])
@pytest.mark.parametrize("content", OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_that_is_something_else_is_refused_and_nothing_is_touched(
    content: bytes, mode: CacheMode, path: Path
) -> None:
    path.write_bytes(content)
    uses = [
        lambda: load(path, mode),
        lambda: TimingCache(path, mode=mode).read(),
        lambda: write(path, "one"),
        lambda: TimingCache(path).merge({"k": 1.0}),
        lambda: BlobCache(path, OURS).refuse("it is of another device"),
    ]
    for number, use in enumerate(uses):
        with pytest.raises(TimingCacheError, match="use another file"):
            use()
        if number < 4:  # the last one comes after a load, which holds the lock
            assert {entry.name: entry.read_bytes() for entry in path.parent.iterdir()} == {"b.timing": content}
    assert snapshot(path.parent) == {"b.timing": content}


def test_a_cache_of_trtexec_is_no_cache_for_onnx_runtime_and_stays(path: Path) -> None:
    path.write_bytes(cache_of("trtexec"))
    with pytest.raises(TimingCacheError, match="not a timing cache of ONNX Runtime"):
        TimingCache(path).merge({"k": 1.0})
    assert path.read_bytes() == cache_of("trtexec")


def test_an_empty_file_counts_as_none(path: Path) -> None:
    path.write_bytes(b"")
    assert load(path) == b""
    write(path, "one")
    assert words_in(load(path)) == {"one"}
    other = path.with_name("o.timing")
    other.write_bytes(b"")
    TimingCache(other).merge({"k": 1.0})
    assert TimingCache(other).read() == {"k": 1.0}
    assert not list(path.parent.glob("*-1*"))


def test_what_trtexec_wrote_and_does_not_combine_is_left(path: Path) -> None:
    path.write_bytes(cache_of("gpu-a"))
    with pytest.raises(TimingCacheError, match="refuses to combine"):
        write(path, "gpu-b")
    assert snapshot(path.parent) == {"b.timing": cache_of("gpu-a")}


def test_one_path_for_two_runtimes_keeps_both(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(path, "one")
    with caplog.at_level(logging.WARNING):
        TimingCache(path).merge({"k": 1.0})
        write(path, "two")
    assert "one of tensorrt 10.16.1.11" in caplog.text
    assert "measured with ONNX Runtime" in caplog.text
    assert words_in(load(path.with_name("b.timing.foreign-1"), "read-only")) == {"one"}
    assert TimingCache(path.with_name("b.timing.foreign-2"), mode="read-only").read() == {"k": 1.0}
    assert words_in(load(path)) == {"two"}


def test_nothing_to_add_writes_nothing(path: Path) -> None:
    BlobCache(path, OURS).merge(b"", combine, entries)
    assert snapshot(path.parent) == {}
    write(path, "one")
    times = path.stat().st_mtime_ns, path.stat().st_ino
    write(path, "one")
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == times


def failing(real: Callable[..., None], at: int) -> Callable[..., None]:
    """A call that finds the disk full from the ``at``-th time on."""
    calls = 0

    def call(*arguments: object, **options: object) -> None:
        nonlocal calls
        calls += 1
        if calls >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments, **options)

    return call


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_leaves_every_file_as_it_was(
    name: str, at: int, earlier: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if earlier:
        write(path, "one")
    before = snapshot(path.parent)
    with monkeypatch.context() as patch:
        real = getattr(os, name)
        patch.setattr(os, name, failing(real, at))
        with pytest.raises(TimingCacheError, match="No space left"):
            write(path, "two")
        if (name, at) == ("replace", 2) and earlier:
            # the sidecar could not be put back: it must still vouch for the old bytes
            patch.undo()
            assert load(path, "verify") == before["b.timing"]
            assert cache_facts(path).health == "ok"
            before["b.timing.json"] = (path.parent / "b.timing.json").read_bytes()
    assert snapshot(path.parent) == before
    write(path, "three")
    assert words_in(load(path)) == ({"one", "three"} if earlier else {"three"})


def test_a_disk_that_is_full_for_a_moment_gets_its_sidecar_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, "one")
    before = snapshot(path.parent)
    real = os.replace

    def full_for_the_blob(source: str, target: str) -> None:
        if Path(target) == path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", full_for_the_blob)
    with pytest.raises(TimingCacheError, match="No space left"):
        write(path, "two")
    assert snapshot(path.parent) == before


@pytest.mark.parametrize("use", ["load", "merge"])
def test_a_lock_that_is_not_given_back_is_an_error(use: str, path: Path) -> None:
    cache = BlobCache(path, OURS, timeout_s=0.05)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            if use == "load":
                cache.load(entries)
            else:
                cache.merge(cache_of("one"), combine, entries)
        except TimingCacheError as error:
            failures.append(error)

    with locked(path):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(10)
    assert len(failures) == 1
    assert "stayed locked" in str(failures[0])
    assert cache.load(entries) == b""


def test_the_lock_of_trtexec_is_waited_for_and_goes_with_its_holder(path: Path) -> None:
    lock = f"{path}.lock"
    with subprocess.Popen([sys.executable, "-c", HOLD_AS_TRTEXEC, lock], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(TimingCacheError, match="another program, such as trtexec"):
            BlobCache(path, OURS, timeout_s=0.1).merge(cache_of("one"), combine, entries)
        holder.kill()
        holder.wait()
        BlobCache(path, OURS, timeout_s=5).merge(cache_of("one"), combine, entries)
    assert words_in(load(path)) == {"one"}


def test_trtexec_is_kept_out_while_the_cache_is_read_and_written(path: Path) -> None:
    write(path, "one")
    codes: list[int] = []

    def asking(first: bytes, second: bytes) -> bytes:
        codes.append(subprocess.call([sys.executable, "-c", TRY_AS_TRTEXEC, f"{path}.lock"]))
        return combine(first, second)

    BlobCache(path, OURS).merge(cache_of("two"), asking, entries)
    assert codes == [1]
    assert subprocess.call([sys.executable, "-c", TRY_AS_TRTEXEC, f"{path}.lock"]) == 0


def test_threads_that_merge_and_load_at_once_lose_nothing(path: Path) -> None:
    failures: list[str] = []
    done = threading.Event()

    def merging(worker: int) -> None:
        for turn in range(10):
            write(path, f"w{worker}t{turn}")

    def reading() -> None:
        # without the lock: bytes and sidecar belong together all the same
        while not done.is_set():
            blob, sidecar = read_pair(path)
            if blob is not None and (sidecar is None or not sidecar.vouches_for(blob)):
                failures.append(f"{blob!r} {sidecar}")

    reader = threading.Thread(target=reading)
    writers = [threading.Thread(target=merging, args=(worker,)) for worker in range(6)]
    for thread in [reader, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not failures
    assert words_in(load(path)) == {f"w{worker}t{turn}" for worker in range(6) for turn in range(10)}
    assert set(snapshot(path.parent)) == {"b.timing", "b.timing.json"}


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(path: Path) -> None:
    write(path, "one")
    mine = [f".b.timing.{'0' * 16}.tmp", f".b.timing.json.{'f' * 16}.tmp"]
    others = [f".c.timing.{'0' * 16}.tmp", ".b.timing.notes.tmp", f"b.timing.{'0' * 16}.tmp"]
    for name in [*mine, *others]:
        (path.parent / name).write_text("part")
    load(path, "read-only")
    assert set(mine) <= set(snapshot(path.parent))
    load(path)
    assert set(snapshot(path.parent)) == {"b.timing", "b.timing.json", *others}


@pytest.mark.parametrize("ending", ["", os.sep])
def test_a_folder_serves_several_machines(ending: str, tmp_path: Path) -> None:
    folder = tmp_path / "caches"
    if not ending:
        folder.mkdir()
    for fingerprint in (OURS, THEIRS, OURS.model_copy(update={"kind": "rtx-runtime"})):
        BlobCache(f"{folder}{ending}", fingerprint).merge(cache_of(fingerprint.version), combine, entries)
    assert {name for name in snapshot(folder) if not name.endswith(".json")} == {
        "tensorrt-10.16.1.11-NVIDIA_L4-cc8.9-cuda13.0.timing",
        "tensorrt-10.3.0.26-NVIDIA_L4-cc9.0-cuda13.0.timing",
        "tensorrt-10.16.1.11-NVIDIA_L4-cc8.9-cuda13.0.runtime-cache",
    }


def test_a_symbolic_link_stays_one(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "shared" / "real.timing"
    target.parent.mkdir()
    path.symlink_to(target)
    write(path, "one")
    write(target, "two")
    assert path.is_symlink()
    assert words_in(load(path)) == words_in(load(target)) == {"one", "two"}


@pytest.mark.parametrize(
    "make", [lambda path: BlobCache(path, OURS).load(entries), lambda path: TimingCache(path).read()]
)
def test_what_is_no_file_is_neither_read_nor_renamed(make: Callable[[Path], object], path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(TimingCacheError, match="no regular file"):
        make(path)
    with pytest.raises(TimingCacheError, match="no regular file"):
        cache_facts(path)
    assert path.is_fifo()


class TestMergingFiles:
    """``merge_caches`` with the library above in the place of TensorRT."""

    @pytest.fixture(autouse=True)
    def library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        functions = {"combine": combine, "entries": entries, "combining": lambda cache: combine}
        library = type("Library", (), {name: staticmethod(function) for name, function in functions.items()})
        monkeypatch.setattr("trtdeploy.runtimes.tensorrt.building.timing.timing_blobs", lambda runtime: library)

    def test_the_output_keeps_what_it_has(self, tmp_path: Path) -> None:
        for name in ("a", "b", "out"):
            write(tmp_path / name, name)
        facts = merge_caches([tmp_path / "a", tmp_path / "b", tmp_path / "a"], tmp_path / "out")
        assert (facts.entries, facts.health) == (3, "ok")
        assert words_in(load(tmp_path / "out")) == {"a", "b", "out"}

    @pytest.mark.parametrize("bad", ["foreign", "measured", "mismatch", "rewritten"])
    def test_what_does_not_belong_together_changes_no_file(self, bad: str, tmp_path: Path) -> None:
        """Not even the output: a command that fails must not set it aside, as a build would."""
        write(tmp_path / "a", "gpu-a")
        out = tmp_path / "out"
        if bad == "foreign":
            write(out, "theirs", fingerprint=THEIRS)
        elif bad == "measured":
            TimingCache(out).merge({"k": 1.0})
        elif bad == "mismatch":
            write(out, "gpu-b")
        else:
            write(out, "ours")
            out.write_bytes(cache_of("something", "else"))
        before = snapshot(tmp_path)
        with pytest.raises(TimingCacheError):
            merge_caches([tmp_path / "a"], out)
        assert snapshot(tmp_path) == before
