"""Promotion on a live server: try the new version beside the old one, then let the server exchange them.

The new version is first loaded under a name of its own, from its files sent with the request, and has to answer the
known sample. Only then does ``config.pbtxt`` name it, and the server loads the model anew: Triton keeps the old version
serving until the new one is ready, and finishes what is in flight. When that fails, the old config comes back.
"""

from __future__ import annotations

import base64
import http.client
import json
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trtdeploy.errors import GateError, RepositoryError, ServerError, TrtDeployError, UsageError
from trtdeploy.triton.client import connect
from trtdeploy.triton.history import Step
from trtdeploy.triton.repository import versions
from trtdeploy.triton.sample import SAMPLE_FILE, difference, read_sample
from trtdeploy.triton.versions import (
    Promotion,
    activate,
    active_version,
    config_of,
    editing,
    previous_version,
)

_POLL_S = 0.05
_NOT_SENT = {SAMPLE_FILE, "config.pbtxt"}


class ModelControl:
    """The model repository API of a server that runs with explicit model control.

    Args:
        url: ``http://host:port``.
        timeout_s: How long a load may take.
    """

    def __init__(self, url: str, *, timeout_s: float = 120.0) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise UsageError(f"{url!r} is not the HTTP URL of a Triton server.", hint="Example: http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        # a proxy that the environment names has no business in front of a server's control
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def load(self, name: str, parameters: dict[str, str] | None = None) -> None:
        """Load a model, or load it anew; returns when it is ready.

        Raises:
            ServerError: The server refuses, or does not answer in time.
        """
        body: dict[str, Any] = {"parameters": parameters} if parameters else {}
        self._post(f"/v2/repository/models/{name}/load", body)

    def unload(self, name: str) -> None:
        """Take a model out of service."""
        self._post(f"/v2/repository/models/{name}/unload", {})

    def wait_until_ready(self, name: str, version: int) -> None:
        """Wait for a version to be ready.

        Raises:
            ServerError: It is not, in time.
        """
        deadline = time.monotonic() + self.timeout_s
        while True:
            if self._is_ready(name, version):
                return
            if time.monotonic() > deadline:
                raise ServerError(f"{name} version {version} was not ready within {self.timeout_s:g} s.")
            time.sleep(_POLL_S)

    def _is_ready(self, name: str, version: int) -> bool:
        try:
            with self._opener.open(f"{self.url}/v2/models/{name}/versions/{version}/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def _post(self, path: str, body: dict[str, Any]) -> None:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with self._opener.open(request, timeout=self.timeout_s) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:2000]
            hint = None
            if "explicit" in text or "polling" in text or "not allowed" in text:
                hint = "Start the server with explicit model control: --model-control-mode=explicit --load-model=*"
            raise ServerError(f"The server at {self.url} refused {path}: {text}", hint=hint) from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"The server at {self.url} did not answer {path}: {error}.") from error


def promote_live(
    repository: str | Path,
    name: str,
    version: int | None = None,
    *,
    url: str,
    timeout_s: float = 120.0,
    step: Step = "promote",
    force: bool = False,
) -> Promotion:
    """Make a version the active one, on a server too.

    Args:
        repository: The repository that the server serves.
        name: The model.
        version: The version; None takes the newest, or for a rollback the one before.
        url: ``http://host:port`` of the server.
        timeout_s: How long each load may take.
        step: "promote" or "rollback".
        force: As for ``promote``.

    Raises:
        ServerError: The server cannot load it. The old version is active and serves.
        GateError: It answers the known sample otherwise than the plan did. The old version is active and serves.
        RepositoryError: As for ``promote``.
    """
    control = ModelControl(url, timeout_s=timeout_s)
    with editing(repository, name) as folder:
        if step == "rollback" and version is None:
            version = previous_version(folder)
        number = version if version is not None else max(versions(folder))
        if number not in versions(folder):
            raise RepositoryError(f"{folder} has no version {number}; it has {versions(folder)}.")
        before = active_version(folder)
        with _candidate(control, folder, number) as candidate:
            _test(url, folder, number, candidate, timeout_s)
        done = activate(folder, number, step=step, force=force)
        try:
            control.load(name)
            control.wait_until_ready(name, number)
            _test(url, folder, number, name, timeout_s)
        except BaseException as error:
            if before is not None and before != number:
                activate(folder, before, step="rollback", force=True)
                if isinstance(error, TrtDeployError):
                    control.load(name)
            raise
    return done


@contextmanager
def _candidate(control: ModelControl, folder: Path, number: int) -> Iterator[str]:
    """Load a version under a name of its own, from files that are sent, and take it out again."""
    from google.protobuf import json_format, text_format

    from trtdeploy.triton.config import schema

    name = f"{folder.name}.candidate-{secrets.token_hex(4)}"
    config = text_format.Parse(config_of(folder, number), schema().ModelConfig())
    config.name = name
    config.ClearField("model_warmup")  # its files lie in the model's folder, and are not sent
    for tensor in config.output:
        tensor.label_filename = ""
    parameters = {"config": json_format.MessageToJson(config, preserving_proto_field_name=True)}
    for path in sorted((folder / str(number)).iterdir()):
        if path.is_file() and path.name not in _NOT_SENT:
            parameters[f"file:{number}/{path.name}"] = base64.b64encode(path.read_bytes()).decode()
    try:
        control.load(name, parameters)
        control.wait_until_ready(name, number)
        yield name
    finally:
        with suppress(ServerError):
            control.unload(name)


def _test(url: str, folder: Path, number: int, name: str, timeout_s: float) -> None:
    """Ask a served version for the known sample."""
    pair = read_sample(folder / str(number))
    if pair is None:
        return
    inputs, expected = pair
    with connect(url, timeout_s=timeout_s) as client:
        answer = client.infer(client.describe(name, str(number)), inputs)
    wrong = difference(expected, answer)
    if wrong:
        raise GateError(
            f"Version {number} of {folder.name} answers the known sample otherwise on {url}: {wrong}.",
            hint="The old version goes on serving. Is the plan for this server's GPU and runtime?",
        )
