from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trtdeploy
from trtdeploy.errors import LedgerError, TrtDeployError, UsageError
from trtdeploy.files import atomic_write, atomic_writer, keep_inputs, locked, sha256_bytes, sha256_file

REPOSITORY = Path(trtdeploy.__file__).parents[1]

WRITE_AND_BLOCK = """
import sys
from trtdeploy.files import atomic_writer
with atomic_writer(sys.argv[1]) as stream:
    stream.write(b"new" * 1000)
    stream.flush()
    print("mid-write", flush=True)
    sys.stdin.read()
"""
WRITE_FOR_EVER = """
import itertools, sys
from trtdeploy.files import atomic_write
for turn in itertools.count():
    atomic_write(sys.argv[1], b"AB"[turn % 2 : turn % 2 + 1] * 300_000)
    print(turn, flush=True)
"""
LOCK_AND_BLOCK = """
import sys
from trtdeploy.files import locked
with locked(sys.argv[1], timeout_s=30):
    print("locked", flush=True)
    sys.stdin.read()
"""
COUNT = """
import sys, threading
from pathlib import Path
from trtdeploy.files import atomic_write, locked
path = Path(sys.argv[1])
def count():
    for _ in range(int(sys.argv[2])):
        with locked(path, timeout_s=60):
            atomic_write(path, str(int(path.read_text()) + 1))
threads = [threading.Thread(target=count) for _ in range(2)]
print("ready", flush=True)
sys.stdin.readline()
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
WRITE_BEYOND_LIMIT = """
import resource, sys
from trtdeploy.files import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    atomic_write(sys.argv[1], b"new" * 1_000_000)
except OSError as error:
    print(error.errno)
"""


@contextmanager
def child(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run a program that imports this package; kill it at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_half(path: Path, error: BaseException) -> None:
    with atomic_writer(path) as stream:
        stream.write(b"new" * 100_000)
        raise error


# --- atomic writes ---


@pytest.mark.parametrize(("content", "on_disk"), [(b"\x00\xff", b"\x00\xff"), ("größer\n", "größer\n".encode())])
def test_bytes_are_written_as_they_are_and_text_as_utf8(tmp_path: Path, content: bytes | str, on_disk: bytes) -> None:
    path = tmp_path / "new" / "folder" / "file.bin"
    atomic_write(path, content)
    assert path.read_bytes() == on_disk
    assert names_in(path.parent) == {"file.bin"}


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_a_writer_that_raises_midway_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    path = tmp_path / "file.bin"
    atomic_write(path, b"old")
    with pytest.raises(kind):
        write_half(path, kind("stop"))
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == {"file.bin"}


def test_a_first_write_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"):
        write_half(tmp_path / "file.bin", ValueError("stop"))
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    path = tmp_path / "file.bin"
    atomic_write(path, b"old")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, function, full)
        with pytest.raises(OSError, match="No space left") as caught:
            atomic_write(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == {"file.bin"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="file size limits are POSIX")
def test_a_write_that_the_system_cuts_short_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    atomic_write(path, b"old")
    with child(WRITE_BEYOND_LIMIT, path) as process:
        assert line_of(process) == str(errno.EFBIG)
        process.wait(timeout=300)
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == {"file.bin"}


def test_a_killed_writer_leaves_the_old_content_and_does_not_hinder_the_next(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    atomic_write(path, b"old")
    with child(WRITE_AND_BLOCK, path) as process:
        assert line_of(process) == "mid-write"
        assert path.read_bytes() == b"old"
        process.kill()
        process.wait(timeout=300)
    assert path.read_bytes() == b"old"
    atomic_write(path, b"newer")
    assert path.read_bytes() == b"newer"


@pytest.mark.parametrize("writes", [1, 4, 9])
def test_kills_at_any_moment_leave_one_whole_version(tmp_path: Path, writes: int) -> None:
    path = tmp_path / "file.bin"
    with child(WRITE_FOR_EVER, path) as process:
        for turn in range(writes):
            assert line_of(process) == str(turn)
        process.kill()
        process.wait(timeout=300)
    assert path.read_bytes() in (b"A" * 300_000, b"B" * 300_000)


def test_readers_see_the_old_version_or_the_new_one_never_a_part(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    versions = [bytes([65 + turn]) * 50_000 for turn in range(20)]
    atomic_write(path, versions[0])
    done = threading.Event()

    def write() -> None:
        try:
            for version in versions:
                atomic_write(path, version)
        finally:
            done.set()

    seen = set()
    with ThreadPoolExecutor(1) as executor:
        writing = executor.submit(write)
        while not done.is_set():
            seen.add(path.read_bytes())
        writing.result()
    assert seen <= set(versions)
    assert path.read_bytes() == versions[-1]


def test_content_reaches_the_disk_before_its_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        mode = os.fstat(descriptor).st_mode
        events.append("sync folder" if stat.S_ISDIR(mode) else f"sync {os.fstat(descriptor).st_size} bytes")
        real_fsync(descriptor)

    def replace(source: str, target: str) -> None:
        events.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    atomic_write(tmp_path / "file.bin", b"12345")
    assert events == ["sync 5 bytes", "rename", "sync folder"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_a_replaced_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    path.chmod(mode)
    atomic_write(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_gets_the_mode_that_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        atomic_write(tmp_path / "file.bin", b"new")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.bin").stat().st_mode) == mode


def test_many_threads_writing_new_files_leave_the_process_umask_alone(tmp_path: Path) -> None:
    before = os.umask(0o027)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as executor:
            list(executor.map(lambda index: atomic_write(tmp_path / str(index), b"x"), range(200)))
        assert os.umask(0o027) == 0o027
    finally:
        sys.setswitchinterval(interval)
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_threads_that_replace_one_file_at_once_leave_one_whole_version(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    versions = [bytes([65 + index]) * 20_000 for index in range(24)]
    with ThreadPoolExecutor(8) as executor:
        list(executor.map(lambda version: atomic_write(path, version), versions))
    assert path.read_bytes() in versions
    assert names_in(tmp_path) == {"file.bin"}


def test_a_folder_in_the_way_is_an_os_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        atomic_write(tmp_path / "taken", b"new")
    assert names_in(tmp_path) == {"taken"}


# --- digests ---


@given(st.binary(max_size=2000))
@settings(deadline=None)
def test_digest_of_bytes_is_sha256(content: bytes) -> None:
    assert sha256_bytes(content) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256) + b"z" * (size % 256)
    (tmp_path / "file.bin").write_bytes(content)
    assert sha256_file(tmp_path / "file.bin") == hashlib.sha256(content).hexdigest()


# --- locks ---


def test_no_update_is_lost_between_threads_and_processes(tmp_path: Path) -> None:
    path = tmp_path / "counter"
    path.write_text("0")
    turns = 12
    with child(COUNT, path, turns) as first, child(COUNT, path, turns) as second:
        for process in (first, second):
            assert line_of(process) == "ready"
        for process in (first, second):
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for _ in range(turns):
            with locked(path):
                atomic_write(path, str(int(path.read_text()) + 1))
        assert [process.wait(timeout=300) for process in (first, second)] == [0, 0]
    assert path.read_text() == str(turns * 2 * 2 + turns)


def test_only_one_thread_at_a_time_is_inside(tmp_path: Path) -> None:
    inside = 0
    most = 0

    def enter(_: int) -> None:
        nonlocal inside, most
        with locked(tmp_path / "file"):
            inside += 1
            most = max(most, inside)
            (tmp_path / "work").write_bytes(b"x" * 10_000)
            inside -= 1

    with ThreadPoolExecutor(6) as executor:
        list(executor.map(enter, range(30)))
    assert most == 1


def test_a_lock_held_elsewhere_times_out_with_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.timing"
    with child(LOCK_AND_BLOCK, path) as process:
        assert line_of(process) == "locked"
        start = time.perf_counter()
        with pytest.raises(TrtDeployError) as caught, locked(path, timeout_s=0.2):
            pytest.fail("the lock was granted twice")
        assert time.perf_counter() - start > 0.15
    assert str(path) in caught.value.message
    assert "0.2 s" in caught.value.message


def test_a_lock_held_by_another_thread_times_out(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def attempt() -> str:
        with pytest.raises(TrtDeployError) as caught, locked(path, timeout_s=0.1):
            pass
        return caught.value.message

    with ThreadPoolExecutor(1) as executor, locked(path):
        assert str(path) in executor.submit(attempt).result(timeout=300)


def test_the_system_releases_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with child(LOCK_AND_BLOCK, path) as process:
        assert line_of(process) == "locked"
        process.kill()
        process.wait(timeout=300)
        with locked(path, timeout_s=10):
            path.write_bytes(b"mine")
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_the_lock_is_released_when_the_block_raises(tmp_path: Path, kind: type[BaseException]) -> None:
    path = tmp_path / "file"
    with pytest.raises(kind), locked(path):
        raise kind
    with locked(path, timeout_s=1):
        pass


def test_locks_of_different_files_are_independent(tmp_path: Path) -> None:
    with locked(tmp_path / "a"), locked(tmp_path / "b", timeout_s=1):
        assert names_in(tmp_path) == {".a.lock", ".b.lock"}


def test_locking_makes_the_folder_but_not_the_file_and_keeps_the_lock_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with locked(path):
        inode = path.with_name(".file.lock").stat().st_ino
    with locked(path):
        assert path.with_name(".file.lock").stat().st_ino == inode
    assert names_in(path.parent) == {".file.lock"}


def test_an_output_never_replaces_what_it_is_made_from(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"model")
    (tmp_path / "link.onnx").symlink_to(model)
    for output in (model, tmp_path / "link.onnx", tmp_path / "." / "model.onnx"):
        with pytest.raises(UsageError, match="would replace the input"):
            keep_inputs(output, tmp_path / "absent", None, model)
    keep_inputs(tmp_path / "other.onnx", model)
    keep_inputs(tmp_path / "absent", tmp_path / "absent")  # nothing is lost


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    target = Path("/proc/out.plan")
    with pytest.raises(OSError, match=r"'/proc/out\.plan'"):
        atomic_write(target, b"x")
    with pytest.raises(LedgerError, match=r"/proc/out\.plan cannot be locked"), locked(target, error=LedgerError):
        raise AssertionError
