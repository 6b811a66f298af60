"""Promotion on a live server: try the new version beside the old one, then let the server exchange them.

The new version is first loaded under a name of its own, from its files sent with the request, and has to answer the
known sample. Only then does ``config.pbtxt`` name it, and the server loads the model anew: Triton keeps the old version
serving until the new one is ready, and finishes what is in flight. When that fails, the old config comes back.

A promotion that is killed leaves one of two things behind, and both are found by ``trtdeploy check --url``
and undone by the next promotion: a candidate that is still loaded, or a config that names a version that the server has
not loaded yet.
"""

from __future__ import annotations

import base64
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trtdeploy.errors import GateError, RepositoryError, ServerError, TrtDeployError
from trtdeploy.triton.client import ConnectionOptions, connect
from trtdeploy.triton.client.model_control import ModelControl
from trtdeploy.triton.repository.add_version import config_of
from trtdeploy.triton.repository.history import Step, read_history, write_history
from trtdeploy.triton.repository.layout import active_version, chosen_version, parse_config, read_config
from trtdeploy.triton.repository.sample import SAMPLE_FILE, difference, read_sample
from trtdeploy.triton.repository.versions import Promotion, activate, editing, previous_version

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_NOT_SENT = {SAMPLE_FILE, "config.pbtxt"}
_CANDIDATE = ".candidate"


def promote_live(
    repository: str | Path,
    name: str,
    version: int | None = None,
    *,
    url: str,
    timeout_s: float = 120.0,
    step: Step = "promote",
    force: bool = False,
    options: ConnectionOptions | None = None,
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
        options: Certificates and headers for the server.

    Raises:
        ServerError: The server cannot load it, or does not answer. The old version is active and serves, or the message
            says that the server has not confirmed that.
        GateError: It answers the known sample otherwise than the plan did. The old version is active and serves.
        RepositoryError: As for ``promote``; or it is an ensemble.
    """
    control = ModelControl(url, timeout_s=timeout_s, options=options)
    with editing(repository, name) as folder:
        if step == "rollback" and version is None:
            version = previous_version(folder)
        number = chosen_version(folder, version)
        _refuse_ensemble(folder)
        before = active_version(folder)
        with _candidate(control, folder, number) as candidate:
            answered = _test(url, folder, number, candidate, timeout_s, options)
        try:
            done = activate(folder, number, step=step, force=force)
            control.load(name)
            control.wait_until_ready(name, number)
            answered += _test(url, folder, number, name, timeout_s, options)
        except BaseException as error:
            if before is not None and before != number and active_version(folder) == number:
                _go_back(control, folder, before, error)
            raise
        if answered:
            history = read_history(folder).with_answers(step, number, before, answered)
            write_history(folder, history)
    return Promotion(done.name, done.version, done.before, dict(answered))


def candidates(loaded: Iterable[str]) -> list[tuple[str, str]]:
    """Return which of the models that a server has loaded are candidates: the model it is one of, and its own name."""
    return [(name.removesuffix(_CANDIDATE), name) for name in loaded if name.endswith(_CANDIDATE)]


def _refuse_ensemble(folder: Path) -> None:
    config = read_config(folder)
    if config.platform == "ensemble":
        steps = sorted({step.model_name for step in config.ensemble_scheduling.step})
        raise RepositoryError(
            f"{folder.name} is an ensemble: it has no plan that a server could try beside the old one. It runs the "
            f"newest versions that are served of {', '.join(steps)}.",
            hint="Promote the one of these that has a new version. Another version of the ensemble itself: promote "
            "it without --url, then let the server load it.",
        )


def _go_back(control: ModelControl, folder: Path, before: int, error: BaseException) -> None:
    """Make the old version active again after ``error``, here and on the server.

    Raises:
        ServerError: The server did not confirm it; the config names the old version nevertheless.
    """
    activate(folder, before, step="withdraw", force=True)
    try:
        control.load(folder.name)
        control.wait_until_ready(folder.name, before)
    except ServerError as second:
        text = f"{folder.name} is at version {before} again, but the server has not confirmed that it serves it"
        if not isinstance(error, TrtDeployError):
            logger.warning("%s: %s", text, second.message)
            return
        raise ServerError(
            f"{error.message} {text}: {second.message}",
            hint=f"When it answers again: trtdeploy check {folder.parent} --url {control.url}",
        ) from error


@contextmanager
def _candidate(control: ModelControl, folder: Path, number: int) -> Iterator[str]:
    """Load a version under a name of its own, from files that are sent, and take it out again."""
    from google.protobuf import json_format

    config = parse_config(config_of(folder, number))
    # always the same name: what a killed promotion has left, or is still loading, is replaced and then taken out
    name = folder.name + _CANDIDATE
    if name in control.loaded():
        logger.warning("%s was left on the server by a promotion that was killed; it is taken out.", name)
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
        try:
            control.unload(name)
        except ServerError as error:
            # nothing depends on it, and the next promotion tries again
            logger.warning("%s may still be loaded on %s: %s", name, control.url, error.message)


def _test(
    url: str, folder: Path, number: int, name: str, timeout_s: float, options: ConnectionOptions | None
) -> Counter[str]:
    """Ask a served model for the known sample as clients do, without a version, and count which version has answered.

    For a moment after an exchange, requests that were on their way may still get the old version.
    """
    pair = read_sample(folder / str(number))
    if pair is None:
        return Counter()
    inputs, expected = pair
    deadline = time.monotonic() + timeout_s
    with connect(url, timeout_s=timeout_s, options=options) as client:
        model = client.describe(name, str(number))
        while True:
            reply = client.request(model, inputs, any_version=True)
            if reply.version == str(number):
                break
            if time.monotonic() > deadline:
                raise ServerError(
                    f"Requests to {name} are answered by version {reply.version}, {timeout_s:g} s after version "
                    f"{number} was loaded.",
                    hint="Is the server's repository this one?",
                )
            time.sleep(_POLL_S)
    wrong = difference(expected, reply.outputs)
    if wrong:
        raise GateError(
            f"Version {number} of {folder.name} answers the known sample otherwise on {url}: {wrong}.",
            hint="The old version goes on serving. Is the plan for this server's GPU and runtime?",
        )
    return Counter([reply.version])
