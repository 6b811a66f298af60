"""Running ``trtdeploy`` as a user does, and looking at the processes that it leaves."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "trtdeploy"]
LIMIT_S = 300.0  # ends what hangs, and decides nothing


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=LIMIT_S, check=False, **options
    )


def cpu_seconds_of(action: Callable[[], None]) -> float:
    """Return the processor time of the child processes of an action, which other processes do not change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    action()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@contextlib.contextmanager
def started(*arguments: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a command; whatever happens, it and what it started are gone at the end."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], **options)
    try:
        yield process
    finally:
        for pid in [*descendants(process.pid), process.pid] if process.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(LIMIT_S)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def wait_until(condition: Callable[[], bool], what: str, *, limit_s: float = LIMIT_S) -> None:
    """Poll a condition for a bounded time."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        time.sleep(0.01)


class ServeCommand:
    """A ``trtdeploy serve`` that has said "ready": its process, its server's processes and its ports."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], LIMIT_S)
        assert readable, "not ready in time"
        line = process.stdout.readline()
        assert line.startswith("ready: "), f"{line!r}, exit code {process.poll()}"
        found = re.search(r"(http://[\d.]+:(\d+)) and (grpc://[\d.]+:(\d+))", line)
        assert found is not None
        self.http_url, self.grpc_url = found[1], found[3]
        self.ports = [int(found[2]), int(found[4])]
        self.children = descendants(process.pid)
        self.server_pid = self.children[0]
        maps = Path(f"/proc/{self.server_pid}/maps").read_text()
        self._shared_memory = {Path(path) for path in re.findall(r"/dev/shm/\S+", maps)}

    def assert_nothing_is_left(self) -> None:
        """No server, no stub, no port; the kernel may take a moment to reap what was killed."""
        wait_until(lambda: not [pid for pid in self.children if is_running(pid)], "all child processes ended")
        for port in self.ports:
            socket.create_server(("127.0.0.1", port)).close()
        for path in self._shared_memory:  # what a server that was killed cannot clean up itself
            path.unlink(missing_ok=True)


SERVE_ON_FREE_PORTS = ("--http-port", 0, "--grpc-port", 0, "--metrics-port", 0)


def descendants(pid: int) -> list[int]:
    """Process ids of all children, parents first."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def is_running(pid: int) -> bool:
    """Say whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
