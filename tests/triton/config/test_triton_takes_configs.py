"""Triton's own parser against our checker: one real server, and every case."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from tests.triton.config.config_cases import BAD, BASE, ENSEMBLE, GOOD, STEP, write_model
from trtdeploy.triton.config import check_config
from trtdeploy.triton.server.installation import find_tritonserver
from trtdeploy.triton.server.process import TritonServer

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("pytriton")

# Triton starts a Python process before it finds these out, or takes them: a second each or more; on "file" it waits for
# ever
SLOW = {"file", "labels", "platform", "platform-onnx", "resource-0"}
SLOW |= {name for name in BAD if name.startswith(("warm-up", "batch-input", "no-"))}
SLOW |= {
    "dim--2",
    "format",
    "non-linear",
    "reshape-0",
    "reshape-dynamic",
    "reshape-empty",
    "shape-tensor",
    "batch-output",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("configs") / "models"
    write_model(repository, "plain", BASE)
    options = ["--model-control-mode=explicit", "--load-model=plain"]
    with TritonServer(
        repository, find_tritonserver(), http_port=0, grpc_port=0, metrics_port=0, options=options
    ) as running:
        yield running


def takes(server: TritonServer, name: str) -> bool:
    request = urllib.request.Request(f"{server.http_url}/v2/repository/models/{name}/load", json.dumps({}).encode())
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=300) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False


def test_triton_takes_what_the_checker_takes(server: TritonServer) -> None:
    for case in GOOD:
        folder = write_model(server.repository, f"good-{case}", GOOD[case])
        assert not [finding for finding in check_config(GOOD[case], folder) if finding.severity == "error"]
        assert takes(server, f"good-{case}"), case


def test_the_checker_refuses_what_triton_refuses(server: TritonServer) -> None:
    refused = 0
    for case in BAD.keys() - SLOW:
        folder = write_model(server.repository, f"bad-{case}", BAD[case])
        errors = [finding for finding in check_config(BAD[case], folder) if finding.severity == "error"]
        if not takes(server, f"bad-{case}"):
            refused += 1
            assert errors, case
    assert refused >= 40


def test_an_ensemble_of_what_is_loaded_is_taken(server: TritonServer) -> None:
    write_model(server.repository, "chained", ENSEMBLE % (STEP % ("x", "m") + STEP % ("m", "y")))
    assert takes(server, "chained")
