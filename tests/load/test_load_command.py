"""``trtdeploy load`` against a real tritonserver, and against nobody."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from trtdeploy.cli.main import app
from trtdeploy.errors import ServerError
from trtdeploy.load.prepared_requests import PreparedRequests
from trtdeploy.plan import Plan
from trtdeploy.tensors import Array
from trtdeploy.triton.client import (
    DeadlineExceededError,
    QueueFullError,
    ServedModel,
    ServerUnavailableError,
    connect,
)
from trtdeploy.triton.config import PackageOptions
from trtdeploy.triton.config.options import QueuePolicy
from trtdeploy.triton.repository.package import package
from trtdeploy.triton.server.installation import find_tritonserver
from trtdeploy.triton.server.process import TritonServer

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("pytriton")

QUICK = ("--warm-up", 0, "--window", 0.1, "--max-windows", 3, "--json")


@pytest.fixture(scope="module")
def server(qdq_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("load") / "models"
    package(qdq_plan.path, repository, "digits")
    # batches of 32 never come about, so that one request at a time waits for the whole delay
    one = QueuePolicy(max_queue_size=1)
    package(qdq_plan.path, repository, "narrow", options=PackageOptions(max_queue_delay_us=3_000, queue_policy=one))
    with TritonServer(repository, find_tritonserver(), http_port=0, grpc_port=0, metrics_port=0) as running:
        yield running


def load(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["load", *map(str, arguments)])


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_both_loops_and_the_server_s_own_times(scheme: str, server: TritonServer) -> None:
    url = server.grpc_url if scheme == "grpc" else server.http_url
    done = load("--url", url, "--model", "digits", "--concurrency", 2, "--rate", 50, "--batch-size", 2, *QUICK)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    closed, opened = facts["points"]
    assert (closed["concurrency"], closed["rate_per_s"], opened["rate_per_s"]) == (2, None, 50)
    for point in (closed, opened):
        assert point["requests"] > 0
        assert point["samples_per_s"] == pytest.approx(2 * point["requests_per_s"])
        assert sum(point["server_ms"].values()) >= 0.5 * point["mean_ms"]
        assert point["server_ms"]["infer"] > 0


def test_the_search_ends_with_a_rate_or_with_exit_code_1(server: TritonServer) -> None:
    common = ("--url", server.grpc_url, "--model", "digits", "--data", "digits", *QUICK)
    found = load(*common, "--slo-p99-ms", 1000)
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)["slo"]
    assert facts["best"]["latency_ms"]["p99"]["value"] <= 1000
    assert facts["best"] == facts["confirmations"][-1]
    assert facts["best"]["requests"] >= 100
    impossible = load(*common, "--slo-p99-ms", 0.001, "--window", 0.05)
    assert impossible.exit_code == 1
    assert json.loads(impossible.stdout)["slo"]["best"] is None


@pytest.mark.parametrize(("scheme", "stream"), [("grpc", False), ("grpc", True), ("http", False)])
def test_a_full_queue_is_said_so_whatever_the_way(scheme: str, stream: bool, server: TritonServer) -> None:
    batch = {"input": np.zeros((1, 3, 32, 32), np.float32)}
    url = server.grpc_url if scheme == "grpc" else server.http_url

    def ask(_: int) -> str:
        try:
            client.infer(model, batch)
        except QueueFullError as error:
            return error.message
        return ""

    with connect(url, stream=stream) as client, ThreadPoolExecutor(6) as threads:
        model = client.describe("narrow")
        answers = list(threads.map(ask, range(6)))
    refused = list(filter(None, answers))
    assert 0 < len(refused) < 6
    assert all("as many wait already as the model's queue may hold" in text for text in refused)


def test_a_load_that_fills_the_queue_is_measured(server: TritonServer) -> None:
    common = ("--url", server.grpc_url, "--model", "narrow", *QUICK, "--window", 0.3)
    done = load(*common, "--concurrency", 8, "--rate", 600)
    assert done.exit_code == 0, done.output
    closed, opened = json.loads(done.stdout)["points"]
    assert closed["refused"] > 0
    assert opened["refused"] > 0.2 * 600 * 0.9
    # three windows, which last longer than they should on a busy machine; on a simulated clock the sum is exact
    assert opened["requests"] + opened["refused"] >= opened["offered_per_s"] * 0.9 - 1
    shown = load(*common[:-3], "--concurrency", 8, "--window", 0.1)
    assert "REFUSED by the queue" in shown.stdout


def test_validate_puts_the_server_s_times_into_its_report(server: TritonServer, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    arguments = ["validate", "--url", server.grpc_url, "--model", "digits", "--data", "digits", "--batch-size", "8"]
    gates = ["--max-variation", "5", "--report", str(tmp_path / "r.html")]
    done = CliRunner().invoke(app, [*arguments, *gates])
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "r.json").read_text())
    assert [part["name"] for part in facts["times"]] == ["client and network", "queue", "input", "infer", "output"]
    assert facts["times"][3]["milliseconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--url", "grpc://127.0.0.1:1", "--model", "m"], 3, "Is it running"),
        (["--url", "ftp://127.0.0.1:1", "--model", "m"], 2, "is not the URL of a Triton server"),
        (["--url", "grpc://127.0.0.1:1"], 2, "--model"),
        (["--url", "grpc://127.0.0.1:1", "--model", "m", "--window", "nan"], 2, "--window"),
        (["--url", "grpc://127.0.0.1:1", "--model", "m", "--concurrency", "0"], 2, "--concurrency"),
    ],
)
def test_wrong_usage_and_absent_servers(arguments: list[str], code: int, words: str) -> None:
    done = load(*arguments)
    assert done.exit_code == code
    assert words in done.stderr
    assert done.stdout == ""


def test_a_batch_that_the_model_does_not_take_is_refused_first(server: TritonServer) -> None:
    done = load("--url", server.grpc_url, "--model", "digits", "--batch-size", 33)
    assert done.exit_code == 2
    assert "at most 32 samples" in done.stderr


def test_requests_that_were_encoded_beforehand_fail_as_others_do(server: TritonServer) -> None:
    batch = {"input": np.zeros((2, 3, 32, 32), np.float32)}
    with connect(server.grpc_url) as client:
        model = client.describe("digits")

    def send(request: dict[str, Array], said: ServedModel, url: str = server.grpc_url, **limits: float) -> None:
        with connect(url, **limits) as client, PreparedRequests(client, said, [batch, request]) as requests:
            requests.send(1)

    send(batch, model, deadline_s=30)
    with pytest.raises(ServerError, match=r"refused: .*unexpected shape"):
        send({"input": batch["input"][:, :2]}, model)
    with pytest.raises(ServerError, match="refused"):
        send(batch, dataclasses.replace(model, version="7"))
    with pytest.raises(ServerError):
        send(batch, dataclasses.replace(model, outputs=(*model.outputs, model.inputs[0])))
    with pytest.raises(DeadlineExceededError, match="within"):
        send(batch, model, deadline_s=1e-6)
    with pytest.raises(ServerUnavailableError):
        send(batch, model, "grpc://127.0.0.1:1")
