"""A promotion on a server that hangs, answers garbage or half a batch: the old version stays the active one."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.fakes import false_triton
from tests.fakes.false_triton import FalseTriton, Fault, running
from trtdeploy.cli.main import app
from trtdeploy.errors import GateError, RepositoryError, ServerError, UsageError
from trtdeploy.plan import Plan
from trtdeploy.triton.client.model_control import ModelControl
from trtdeploy.triton.config import PackageOptions
from trtdeploy.triton.pipeline import package_pipeline
from trtdeploy.triton.repository.differences.drift import find_drift
from trtdeploy.triton.repository.history import read_history
from trtdeploy.triton.repository.layout import active_version, read_config
from trtdeploy.triton.repository.live_promotion import promote_live
from trtdeploy.triton.repository.package import package
from trtdeploy.triton.repository.sample import read_sample
from trtdeploy.triton.repository.versions import publish, rollback

pytest.importorskip("tritonclient.http")

TIMEOUT_S = 10.0
SHORT_S = 0.7  # where the server takes for ever
SAMPLE = np.random.default_rng(3).standard_normal((4, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def published(qdq_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with versions 1 and 2; version 1 is active."""
    models = tmp_path_factory.mktemp("published") / "models"
    for _ in range(2):
        publish(qdq_plan.path, models, "m", sample={"input": SAMPLE})
    return models


@pytest.fixture
def models(published: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(published, tmp_path / "models"))


@pytest.fixture
def server(models: Path) -> Iterator[FalseTriton]:
    """Serves version 1, and loads what the config names."""
    pair = read_sample(models / "m" / "2")
    assert pair is not None
    with running(FalseTriton(pair[1], ("input", (-1, 3, 32, 32)))) as server:
        server.served["m"] = ["1"]
        server.to_load = lambda name: [str(active_version(models / "m")) if name == "m" else "2"]
        yield server


def promote(models: Path, server: FalseTriton, timeout_s: float = TIMEOUT_S) -> None:
    promote_live(models, "m", url=server.url, timeout_s=timeout_s)


def test_a_server_that_behaves_gets_the_new_version(models: Path, server: FalseTriton) -> None:
    done = promote_live(models, "m", url=server.url, timeout_s=TIMEOUT_S)
    assert (done.version, done.before, done.answered_by) == (2, 1, {"2": 2})
    assert server.served == {"m": ["2"]}
    last = read_history(models / "m").events[-1]
    assert (last.step, last.version, last.answered_by) == ("promote", 2, {"2": 2})
    shown = CliRunner().invoke(app, ["versions", "--name", "m", "--repository", str(models), "--history"]).stdout
    assert shown.splitlines()[-1].endswith("promote  2  before: 1  version 2 has answered")
    assert find_drift(models, server.url) == []


FAULTS: list[tuple[str, Fault, type[Exception], str]] = [
    ("load", false_triton.hang, ServerError, "did not answer .*/load within 0.7 s"),
    ("load", false_triton.drip, ServerError, "did not answer .*/load within 0.7 s"),
    ("load", false_triton.close, ServerError, "did not answer .*/load"),
    ("load", false_triton.junk, ServerError, "did not answer .*/load"),
    ("load", false_triton.broken_off, ServerError, "refused .*/load .*500.: out of"),
    ("load", false_triton.out_of_memory, ServerError, "refused .*/load .*out of memory"),
    ("ready", false_triton.hang, ServerError, "was not ready within 0.7 s"),
    ("metadata", false_triton.page, ServerError, "no usable answer"),
    ("infer", false_triton.hang, ServerError, "did not answer within 0.7 s"),
    ("infer", false_triton.drip, ServerError, "did not answer within 0.7 s"),
    ("infer", false_triton.junk, ServerError, "no usable answer|unavailable"),
    ("infer", false_triton.page, ServerError, "no usable answer"),
    ("infer", false_triton.half_a_batch, GateError, r"shape \[2, 10\], not \[4, 10\]"),
    ("infer", false_triton.not_finite, GateError, "off by nan"),
    ("infer", false_triton.by_another_version, ServerError, "answered by version 1, 0.7 s after version 2"),
]


@pytest.mark.parametrize("candidate", [True, False], ids=["candidate", "exchange"])
@pytest.mark.parametrize(
    ("kind", "fault", "error", "words"), FAULTS, ids=[f"{kind}-{fault.__name__}" for kind, fault, _, _ in FAULTS]
)
def test_the_old_version_stays_active(
    kind: str,
    fault: Fault,
    error: type[Exception],
    words: str,
    candidate: bool,
    models: Path,
    server: FalseTriton,
) -> None:
    before = (models / "m" / "config.pbtxt").read_bytes()
    server.faults = {(kind, candidate): fault}
    with pytest.raises(error, match=words):
        promote(models, server, SHORT_S if "0.7 s" in words else TIMEOUT_S)
    assert (models / "m" / "config.pbtxt").read_bytes() == before
    assert not [name for name in server.served if "candidate" in name]
    steps = [event.step for event in read_history(models / "m").events]
    assert steps == ["publish", "publish"] + ([] if candidate else ["promote", "withdraw"])
    with pytest.raises(RepositoryError, match="no version to roll back to"):
        rollback(models, "m")  # the one that has failed is none
    if kind != "load":
        assert server.served["m"] == ["1"]
    server.faults.clear()
    promote(models, server)
    assert server.served == {"m": ["2"]}


def test_a_packaged_version_that_comes_back_is_served_as_it_was_packaged(qdq_plan: Plan, tmp_path: Path) -> None:
    models = tmp_path / "models"
    folder = package(qdq_plan.path, models, "m", options=PackageOptions(instances=3, max_batch_size=8)).folder
    publish(qdq_plan.path, models, "m", sample={"input": SAMPLE})
    (folder / "1" / "config.pbtxt").unlink()  # as publishing left it in earlier releases
    before = (folder / "config.pbtxt").read_bytes()
    pair = read_sample(folder / "2")
    assert pair is not None
    with running(FalseTriton(pair[1], ("input", (-1, 3, 32, 32)))) as server:
        server.to_load = lambda name: [str(active_version(folder)) if name == "m" else "2"]
        server.faults = {("infer", False): false_triton.half_a_batch}
        with pytest.raises(GateError):
            promote(models, server)
    assert (folder / "config.pbtxt").read_bytes() == before
    assert read_config(folder).instance_group[0].count == 3


@pytest.mark.parametrize("candidate", [True, False], ids=["candidate", "exchange"])
@pytest.mark.parametrize("step", ["promote", "rollback"])
def test_a_sigterm_takes_everything_back(step: str, candidate: bool, models: Path, server: FalseTriton) -> None:
    if step == "rollback":
        promote(models, server)
    before, served = (models / "m" / "config.pbtxt").read_bytes(), list(server.served["m"])
    loading = threading.Event()

    def slow(handler: false_triton.Handler) -> None:
        server.faults.clear()  # the next one is served
        loading.set()
        false_triton.hang(handler)

    server.faults = {("load", candidate): slow}
    tried = "1" if step == "rollback" else "2"
    server.to_load = lambda name: [str(active_version(models / "m")) if name == "m" else tried]
    arguments = [step, "--name", "m", "--repository", str(models), "--url", server.url]
    process = subprocess.Popen([sys.executable, "-m", "trtdeploy", *arguments], stderr=subprocess.PIPE, text=True)
    try:
        assert loading.wait(30)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert (process.returncode, "Stopped." in said) == (130, True)
    assert (models / "m" / "config.pbtxt").read_bytes() == before
    assert server.served == {"m": served}
    steps = [event.step for event in read_history(models / "m").events]
    assert steps[-1] == ("withdraw" if not candidate else "promote" if step == "rollback" else "publish")


def test_an_ensemble_is_refused_with_the_models_to_promote_instead(
    qdq_plan: Plan, models: Path, server: FalseTriton
) -> None:
    package_pipeline(qdq_plan.path, models, "e")
    before = (models / "e_pipeline" / "config.pbtxt").read_bytes()
    with pytest.raises(RepositoryError, match=r"e_pipeline is an ensemble.* e, e_postprocess, e_preprocess") as caught:
        promote_live(models, "e_pipeline", url=server.url)
    assert "Promote the one of these" in str(caught.value)
    assert (models / "e_pipeline" / "config.pbtxt").read_bytes() == before
    assert server.served == {"m": ["1"]}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (false_triton.too_large, r"Start the server with --http-max-input-size=67108864: trtdeploy serve"),
        (false_triton.gateway_limit, r"The request has \d{4,} bytes, more than a gateway"),
    ],
)
def test_a_version_that_is_too_large_for_one_request_is_said_so(
    fault: Fault, words: str, models: Path, server: FalseTriton
) -> None:
    server.faults = {("load", True): fault}
    with pytest.raises(ServerError, match="refused") as caught:
        promote(models, server)
    assert re.search(words, str(caught.value))
    assert active_version(models / "m") == 1


def test_a_server_that_does_not_confirm_the_old_version_is_said_to(models: Path, server: FalseTriton) -> None:
    server.faults = {("load", False): false_triton.hang}
    with pytest.raises(ServerError, match="m is at version 1 again, but the server has not confirmed") as caught:
        promote(models, server, SHORT_S)
    assert f"trtdeploy check {models} --url {server.url}" in str(caught.value)


def test_a_candidate_that_cannot_be_taken_out_is_named_and_the_next_promotion_takes_it(
    models: Path, server: FalseTriton, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults = {("unload", True): false_triton.out_of_memory, ("infer", True): false_triton.half_a_batch}
    with caplog.at_level(logging.WARNING), pytest.raises(GateError):
        promote(models, server)
    (left,) = [name for name in server.served if "candidate" in name]
    assert f"{left} may still be loaded" in caplog.text
    server.served["other.candidate"] = ["1"]  # somebody else's promotion may be running
    (found,) = [finding for name, finding in find_drift(models, server.url) if name == "m"]
    assert (found.severity, found.message.split()[0]) == ("error", left)
    server.faults.clear()
    promote(models, server)
    assert server.served == {"m": ["2"], "other.candidate": ["1"]}


@pytest.mark.parametrize(
    "fault",
    [false_triton.hang, false_triton.page, false_triton.junk, false_triton.broken_off],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize(("kind", "call"), [("loaded", "loaded"), ("index", "reasons")])
def test_a_server_that_gives_no_list_of_its_models_is_a_server_error(
    kind: str, call: str, fault: Fault, models: Path, server: FalseTriton
) -> None:
    server.faults = {(kind, False): fault}
    with pytest.raises(ServerError, match=r"no list of its models|did not answer|status 500"):
        getattr(ModelControl(server.url, timeout_s=SHORT_S), call)()


def test_the_check_says_what_a_server_serves_otherwise(models: Path, server: FalseTriton) -> None:
    def check() -> tuple[int, list[dict[str, str]]]:
        done = CliRunner().invoke(app, ["check", str(models), "--url", server.url, "--json"])
        return done.exit_code, [entry for entry in json.loads(done.stdout) if entry["where"].startswith("server")]

    assert check() == (0, [])
    server.served["m"] = ["2"]
    code, (entry,) = check()
    assert code == 1
    assert entry["message"] == "Served is version 2; the repository names 1."
    assert f"--version 1 --url {server.url}" in entry["hint"]
    server.served.clear()
    code, (entry,) = check()
    assert (code, entry["severity"], entry["message"]) == (0, "warning", "No version is served.")


@pytest.mark.parametrize("url", ["", "grpc://127.0.0.1:1", "http://", "http://127.0.0.1", "http://127.0.0.1:x"])
def test_what_is_no_url_of_a_servers_control_is_a_usage_error(url: str) -> None:
    with pytest.raises(UsageError, match=r"http://127\.0\.0\.1:8000"):
        ModelControl(url)
