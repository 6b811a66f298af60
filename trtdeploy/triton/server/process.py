"""Running a tritonserver over a model repository: start, wait until ready, pass its log on, stop."""

from __future__ import annotations

import contextlib
import errno
import http.client
import logging
import math
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from trtdeploy.errors import ServerError, UsageError
from trtdeploy.triton.repository.layout import model_names
from trtdeploy.triton.server.installation import Installation
from trtdeploy.triton.server.watchdog import Watchdog

logger = logging.getLogger(__name__)

_KEPT_LOG_LINES = 200
_POLL_S = 0.05
# glibc gives freed memory back and maps it anew for each tensor of more than 128 KiB, page fault by page fault; with
# these it stays with the process (mallopt(3)).
_ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
# getopt's messages (getopt_long(3)); hundreds of lines of usage follow
_REFUSED_OPTION = re.compile(r": ((?:unrecognized|ambiguous|invalid) option .*|option '.*' .* an argument)")
# What every tritonserver without a GPU says at level error, whatever else is wrong.
_NOISE = ("CudaDriverHelper has not been initialized", "Failed to initialize NVML")
# A proxy that the environment names has no business between us and a server that we have just started.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class TritonServer:
    """A tritonserver process. Use it as a context manager, or call ``start`` and ``stop``.

    Args:
        repository: The model repository.
        installation: Which server; see ``find_tritonserver``.
        host: Address to listen on; loopback unless told otherwise.
        http_port: 0 takes a free one, as for the others.
        grpc_port: Port of the gRPC endpoint.
        metrics_port: Port of the metrics endpoint.
        log: Called with every line that the server prints.
        options: Further options, handed to tritonserver as they are.
        models: The models that it loads, for people; all that the repository holds if None.
        health_headers: What HTTP requests for the server's health must carry, where the options restrict them.
        ready_timeout_s: How long all models may take to become ready.
        drain_timeout_s: How long running requests may take when the server is stopped.
    """

    def __init__(
        self,
        repository: str | Path,
        installation: Installation,
        *,
        host: str = "127.0.0.1",
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        log: Callable[[str], None] | None = None,
        options: Sequence[str] = (),
        models: Sequence[str] | None = None,
        health_headers: Mapping[str, str] | None = None,
        ready_timeout_s: float = 120.0,
        drain_timeout_s: float = 30.0,
    ) -> None:
        self.repository = Path(repository)
        self.models = model_names(self.repository) if models is None else list(models)
        self._health_headers = dict(health_headers or {})
        self.installation = installation
        self.host = host
        self.http_port, self.grpc_port, self.metrics_port = _claim_ports(host, (http_port, grpc_port, metrics_port))
        self._log = log
        self._refused_option: str | None = None
        self._options = tuple(options)
        self._ready_timeout_s = ready_timeout_s
        self._drain_timeout_s = drain_timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._watchdog: Watchdog | None = None
        self._reader: threading.Thread | None = None
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LOG_LINES)

    @property
    def http_url(self) -> str:
        """Where HTTP requests go."""
        return f"http://{_reachable(self.host)}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """Where gRPC requests go."""
        return f"grpc://{_reachable(self.host)}:{self.grpc_port}"

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        return self._running().pid

    def start(self) -> None:
        """Start the server and return when every model is ready.

        Raises:
            ServerError: It cannot be started, a model does not load, or it is not ready in time; its last lines are
                included, and nothing is left running.
        """
        if self._process is not None:
            raise ServerError("The server is already running.")
        try:
            self._process = subprocess.Popen(
                self.command,
                env={**_ALLOCATION, **os.environ, **self.installation.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                # Ctrl-C in a terminal reaches the whole group: we stop the server ourselves, in order.
                start_new_session=True,
            )
        except OSError as error:
            raise ServerError(f"{self.installation.binary} cannot be started: {error}.") from error
        try:
            self._watchdog = Watchdog(self._process.pid, grace_s=self._drain_timeout_s)
            self._reader = threading.Thread(target=self._pass_log_on, args=(self._process,), daemon=True)
            self._reader.start()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    @property
    def command(self) -> list[str]:
        """The command line of the server."""
        command = [
            str(self.installation.binary),
            f"--model-repository={self.repository.resolve()}",
            f"--http-address={self.host}",
            f"--grpc-address={self.host}",
            f"--metrics-address={self.host}",
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
            f"--exit-timeout-secs={math.ceil(self._drain_timeout_s)}",
        ]
        if self.installation.backends is not None:
            command.append(f"--backend-directory={self.installation.backends}")
        return command + list(self._options)

    def wait(self, poll_s: float = 0.5) -> None:
        """Block for as long as the server runs.

        Raises:
            ServerError: It ended by itself.
        """
        process = self._running()
        while process.poll() is None:
            try:
                process.wait(poll_s)
            except subprocess.TimeoutExpired:
                continue
        raise self._died()

    def check_alive(self) -> None:
        """Raise ``ServerError`` with the server's last lines if it has ended."""
        if self._running().poll() is not None:
            raise self._died()

    def stop(self) -> None:
        """Let running requests finish, then end the server. Stopping twice does nothing.

        Whatever interrupts the wait, a second Ctrl-C for example, ends the server at once.
        """
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(self._drain_timeout_s + 10)
        finally:
            # The Python backend's stubs are in the server's own process group; none may outlive it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if self._watchdog is not None:
                self._watchdog.end()
            if self._reader is not None:
                self._reader.join(timeout=5)
            if process.stdout is not None:
                process.stdout.close()

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise ServerError("The server is not running.")
        return self._process

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._ready_timeout_s
        while not self._is_ready():
            self.check_alive()
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.repository} was not ready within {self._ready_timeout_s:g} s.", log_lines=self._tail()
                )
            time.sleep(_POLL_S)

    def _is_ready(self) -> bool:
        try:
            request = urllib.request.Request(f"{self.http_url}/v2/health/ready", headers=self._health_headers)
            with _DIRECT.open(request, timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def _pass_log_on(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None  # asked for in start()
        log = self._log
        for line in process.stdout:
            self._last_lines.append(line.rstrip("\n"))
            if self._refused_option is None and (match := _REFUSED_OPTION.search(line)):
                self._refused_option = match[1].rstrip()
            try:
                if log is not None:
                    log(line.rstrip("\n"))
            except (
                OSError,
                ValueError,
            ) as error:  # stderr is gone; unread, the pipe would fill up and block the server
                log = None
                logger.debug("the server's log goes nowhere any more: %s", error)

    def _died(self) -> ServerError:
        code = self._running().wait()
        if self._reader is not None:
            self._reader.join(timeout=5)
        if code > 0 and self._refused_option is not None:
            return ServerError(
                f"tritonserver refuses its command line: {self._refused_option}.",
                hint=f"Another release may have it; this one's options: {self.installation.binary} --help",
            )
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return ServerError(f"tritonserver ended with {how}.", log_lines=self._tail())

    def _tail(self) -> list[str]:
        """Return the lines that say what went wrong, else the last ones."""
        lines = [line for line in self._last_lines if not any(noise in line for noise in _NOISE)]
        return ([line for line in lines if line.startswith("E")] or lines)[-10:]


def _claim_ports(host: str, wanted: Sequence[int]) -> tuple[int, ...]:
    """Replace 0 by free ports and check that every port is free.

    Raises:
        ServerError: A port is taken, or the address is not one of this machine.
        UsageError: Two ports are the same.
    """
    fixed = [port for port in wanted if port]
    if len(set(fixed)) != len(fixed):
        raise UsageError(f"The ports {', '.join(map(str, fixed))} must differ.")
    sockets: list[socket.socket] = []
    try:
        for port in wanted:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            holder = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(holder)
            # as the server does: a port in TIME_WAIT is free
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                holder.bind((host, port))
                holder.listen(1)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise ServerError(
                        f"Port {port} on {host} is taken by another program.",
                        hint="Stop it, or choose others: --http-port, --grpc-port, --metrics-port; 0 takes a free one.",
                    ) from error
                raise ServerError(f"{host}:{port} cannot be listened on: {error}.") from error
        return tuple(holder.getsockname()[1] for holder in sockets)
    finally:
        for holder in sockets:
            holder.close()


def _reachable(host: str) -> str:
    """Return an address that a client on this machine can use for a listening address."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
