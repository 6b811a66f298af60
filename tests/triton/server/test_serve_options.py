"""`trtdeploy serve`: restricted endpoints, TLS, explicit mode, only the ensembles, draining, and a killed owner."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.commands import LIMIT_S, SERVE_ON_FREE_PORTS, ServeCommand, started
from trtdeploy.plan import Plan
from trtdeploy.triton.client import connect
from trtdeploy.triton.config import PackageOptions
from trtdeploy.triton.pipeline import package_pipeline
from trtdeploy.triton.repository.package import package

grpc = pytest.importorskip("tritonclient.grpc")
pytest.importorskip("pytriton")

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
DELAY_S = 1.5


def status(url: str, *, post: bool = False, **headers: str) -> int:
    request = urllib.request.Request(url, data=b"{}" if post else None, headers=headers)
    try:
        with DIRECT.open(request, timeout=LIMIT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def infer(client: Any, model: str) -> Any:
    batch = np.zeros((1, 3, 32, 32), np.float32)
    tensor = grpc.InferInput("input", list(batch.shape), "FP32")
    tensor.set_data_from_numpy(batch)
    return client.infer(model, [tensor], client_timeout=LIMIT_S).as_numpy("logits")


def read_along(process: subprocess.Popen[str]) -> list[str]:
    lines: list[str] = []
    stream = process.stderr
    assert stream is not None
    threading.Thread(target=lambda: lines.extend(stream), daemon=True).start()
    return lines


def test_a_guarded_server_lets_in_who_has_the_key_and_ends_when_its_owner_is_killed(
    qdq_plan: Plan, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        package(qdq_plan.path, tmp_path / "models", name)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*new, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    arguments = (
        *("--explicit", "--load", "first", "--restrict", "health,model-repository:guard=s3cret"),
        *("--grpc-tls-cert", cert, "--grpc-tls-key", key, "--log-level", "error"),
    )
    with started("serve", tmp_path / "models", *SERVE_ON_FREE_PORTS, *arguments) as process:
        log = read_along(process)
        server = ServeCommand(process)
        ready = f"{server.http_url}/v2/health/ready"
        assert status(ready) in (401, 403)
        assert status(ready, guard="s3cret") == 200
        load = f"{server.http_url}/v2/repository/models/second/load"
        model = f"{server.http_url}/v2/models/second"
        assert status(load, post=True) in (401, 403)
        assert status(load, post=True, guard="wrong") in (401, 403)
        assert status(model) != 200
        assert status(load, post=True, guard="s3cret") == 200
        assert status(model) == 200

        address = server.grpc_url.removeprefix("grpc://")
        over_tls = grpc.InferenceServerClient(address, ssl=True, root_certificates=str(cert))
        assert infer(over_tls, "first").shape == (1, 10)
        over_tls.close()
        in_plain = grpc.InferenceServerClient(address)
        with pytest.raises(grpc.InferenceServerException):
            infer(in_plain, "first")
        in_plain.close()
        assert not [line for line in log if line.startswith("I")]

        os.kill(process.pid, signal.SIGKILL)
        process.wait(LIMIT_S)
        server.assert_nothing_is_left()


def test_only_the_ensemble_is_served_and_what_runs_at_sigterm_is_answered(qdq_plan: Plan, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    slow = PackageOptions(max_queue_delay_us=int(DELAY_S * 1_000_000))
    package_pipeline(qdq_plan.path, repository, "digits", options=slow)
    package(qdq_plan.path, repository, "other")
    with started("serve", repository, "--ensemble", *SERVE_ON_FREE_PORTS) as process, ThreadPoolExecutor(1) as threads:
        read_along(process)
        server = ServeCommand(process)
        models = {
            name: status(f"{server.http_url}/v2/models/{name}/ready")
            for name in ("digits_pipeline", "digits_preprocess", "digits", "digits_postprocess", "other")
        }
        assert models.pop("other") != 200
        assert set(models.values()) == {200}
        # nobody asked for loading over the network
        assert status(f"{server.http_url}/v2/repository/models/other/load", post=True) in (401, 403)

        with connect(server.grpc_url, timeout_s=LIMIT_S) as client:
            model = client.describe("digits")
            waiting = threads.submit(client.infer, model, {"input": np.zeros((1, 3, 32, 32), np.float32)})
            time.sleep(DELAY_S / 3)
            assert not waiting.done()
            process.send_signal(signal.SIGTERM)
            assert waiting.result(LIMIT_S)["logits"].shape == (1, 10)
        assert process.wait(LIMIT_S) == 0
        server.assert_nothing_is_left()
