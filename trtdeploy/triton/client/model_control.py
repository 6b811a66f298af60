"""Triton's model repository API: which models a server has, and loading and unloading them.

Source: Triton's model repository extension (``docs/protocol/extension_model_repository.md``).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from trtdeploy.errors import ServerError, UsageError
from trtdeploy.triton.client.connect_url import parse_endpoint
from trtdeploy.triton.client.connection.options import ConnectionOptions, RequestLimits
from trtdeploy.triton.client.connection.tls import ssl_context
from trtdeploy.triton.client.errors import AccessDeniedError, Failures

_POLL_S = 0.05
_SHORT_S = 5.0
_LARGEST_ANSWER_BYTES = 16 << 20
_SHOWN_CHARACTERS = 2000
# Triton's option that limits the JSON of a request, which its refusal names (its http_server.cc); 64 MiB by default.
_INPUT_SIZE = "http-max-input-size"
_STEP_BYTES = 64 << 20


class ModelControl:
    """The model repository API of a server. To load and to unload, it must run with explicit model control.

    A call takes at most ``timeout_s`` in all, also where the server sends byte by byte.

    Args:
        url: ``http://host:port``, or ``https://host:port``.
        timeout_s: How long a load may take.
        options: Certificates and headers.

    Raises:
        UsageError: The URL has another form, or the certificates do not fit together.
    """

    def __init__(self, url: str, *, timeout_s: float = 120.0, options: ConnectionOptions | None = None) -> None:
        options = options or ConnectionOptions()
        endpoint = parse_endpoint(url, options)
        if endpoint.protocol != "http":
            raise UsageError(
                f"{endpoint.url} is not the HTTP URL of a Triton server.", hint="Example: http://127.0.0.1:8000"
            )
        self.url = endpoint.url
        self.timeout_s = timeout_s
        parts = urlsplit(self.url)
        self._host, self._port, self._base = parts.hostname or "", parts.port, endpoint.path
        self._context = ssl_context(options) if endpoint.tls else None
        self._headers = options.plain_headers()
        self._failures = Failures(endpoint, options, RequestLimits(timeout_s=timeout_s))

    def loaded(self) -> dict[str, list[int]]:
        """Return the versions of each model that the server has loaded, ascending.

        The server's statistics list them all; its repository index leaves out models whose files were sent to it.

        Raises:
            ServerError: The server refuses, does not answer in time, or answers something else.
        """
        path = "/v2/models/stats"
        content = self._accepted(path, *self._exchange("GET", path, None, min(self.timeout_s, 4 * _SHORT_S)))
        found: dict[str, list[int]] = {}
        with self._understood():
            for entry in json.loads(content)["model_stats"]:
                found.setdefault(str(entry["name"]), []).append(int(entry["version"]))
        return {name: sorted(versions) for name, versions in found.items()}

    def reasons(self) -> dict[str, str]:
        """Return why the models of the server's repository that it could not load, or has unloaded, are not there.

        Raises:
            ServerError: As for ``loaded``.
        """
        content = self._post("/v2/repository/index", {}, min(self.timeout_s, 4 * _SHORT_S))
        with self._understood():
            return {str(entry["name"]): entry["reason"] for entry in json.loads(content) if entry.get("reason")}

    def load(self, name: str, parameters: dict[str, str] | None = None) -> None:
        """Load a model, or load it anew; returns when it is ready.

        Raises:
            ServerError: The server refuses, or does not answer in time.
        """
        body: dict[str, Any] = {"parameters": parameters} if parameters else {}
        self._post(f"/v2/repository/models/{name}/load", body, self.timeout_s)

    def unload(self, name: str) -> None:
        """Take a model out of service.

        Raises:
            ServerError: As for ``load``.
        """
        self._post(f"/v2/repository/models/{name}/unload", {}, min(self.timeout_s, 2 * _SHORT_S))

    def wait_until_ready(self, name: str, version: int) -> None:
        """Wait for a version to be ready.

        Raises:
            ServerError: It is not, in time.
        """
        deadline = time.monotonic() + self.timeout_s
        while not self._is_ready(name, version):
            if time.monotonic() > deadline:
                raise ServerError(f"{name} version {version} was not ready within {self.timeout_s:g} s.")
            time.sleep(_POLL_S)

    def _is_ready(self, name: str, version: int) -> bool:
        try:
            status, _ = self._exchange(
                "GET", f"/v2/models/{name}/versions/{version}/ready", None, min(self.timeout_s, _SHORT_S)
            )
        except ServerError:  # asked again until the deadline, which is the error
            return False
        return status == http.HTTPStatus.OK

    def _post(self, path: str, body: dict[str, Any], timeout_s: float) -> bytes:
        message = json.dumps(body).encode()
        return self._accepted(path, *self._exchange("POST", path, message, timeout_s), sent_bytes=len(message))

    def _accepted(self, path: str, status: int, content: bytes, *, sent_bytes: int = 0) -> bytes:
        if status == http.HTTPStatus.OK:
            return content
        text = content.decode(errors="replace")[:_SHOWN_CHARACTERS]
        meant = self._failures.status(str(status), text)
        if isinstance(meant, AccessDeniedError):
            raise meant
        hint = None
        if "explicit" in text or "polling" in text or "not allowed" in text:
            hint = "Start the server with explicit model control: trtdeploy serve REPOSITORY --explicit"
        if _INPUT_SIZE in text:
            hint = (
                f"The files of a version travel in one request, of {sent_bytes} bytes here. Start the server with "
                f"--{_INPUT_SIZE}={_rounded_up(sent_bytes)}: trtdeploy serve has this option, too."
            )
        elif status == http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            hint = (
                f"The request has {sent_bytes} bytes, more than a gateway before the server lets through. Raise its "
                "limit, or ask the server itself."
            )
        raise ServerError(f"The server at {self.url} refused {path} (status {status}): {text}", hint=hint)

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise ServerError(
                f"The server at {self.url} gave no list of its models: {type(error).__name__}: {error}.",
                hint="Is this the HTTP port of a Triton server?",
            ) from error

    def _exchange(self, method: str, path: str, body: bytes | None, timeout_s: float) -> tuple[int, bytes]:
        """Send one request; http.client's own timeout begins anew with every byte, so a timer ends the whole."""
        # http.client asks no proxy that the environment names: it has no business in front of a server's control
        connection = (
            http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
            if self._context is None
            else http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=self._context)
        )
        late = threading.Event()
        try:
            connection.connect()
            timer = threading.Timer(timeout_s, _hang_up, (connection.sock, late))
            timer.daemon = True
            timer.start()
            try:
                content_type = {"Content-Type": "application/json"} if body else {}
                connection.request(method, self._base + path, body, content_type | self._headers)
                answer = connection.getresponse()
                content = answer.read(_LARGEST_ANSWER_BYTES)
            finally:
                timer.cancel()
            if late.is_set():
                raise TimeoutError
            return answer.status, content
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: TLS, after the timer
            if isinstance(error, ssl.SSLError) and not late.is_set() and not isinstance(error, TimeoutError):
                raise self._failures.explain(error) from error
            if late.is_set() or isinstance(error, TimeoutError):
                raise ServerError(
                    f"The server at {self.url} did not answer {path} within {timeout_s:g} s.",
                    hint="Does it hang? Look at its log; a large model may need a longer --timeout.",
                ) from error
            raise ServerError(
                f"The server at {self.url} did not answer {path}: {type(error).__name__}: {error}.",
                hint="Is it running, and is this its HTTP port?",
            ) from error
        finally:
            connection.close()


def _rounded_up(size_bytes: int) -> int:
    return -(-size_bytes // _STEP_BYTES) * _STEP_BYTES


def _hang_up(connection: socket.socket, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
