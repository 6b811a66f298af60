"""Versions under load and under kills, on a real server; the long form is benchmarks/publish_soak.py."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.publish_soak import NAME, Clients, make_plans, under_kills, under_load
from trtdeploy.cli.main import app
from trtdeploy.errors import GateError, ServerError
from trtdeploy.plan import Plan
from trtdeploy.triton.client import connect
from trtdeploy.triton.client.model_control import ModelControl
from trtdeploy.triton.repository.layout import active_version
from trtdeploy.triton.repository.live_promotion import promote_live
from trtdeploy.triton.repository.sample import SAMPLE_FILE
from trtdeploy.triton.repository.versions import publish
from trtdeploy.triton.server.installation import find_tritonserver
from trtdeploy.triton.server.process import TritonServer
from trtdeploy.triton.targets.served_classifier import ServedTarget

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("pytriton")


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_plans(tmp_path_factory.mktemp("plans"))


def explicit(repository: Path) -> TritonServer:
    options = ["--model-control-mode=explicit", "--load-model=*"]
    return TritonServer(repository, find_tritonserver(), http_port=0, grpc_port=0, metrics_port=0, options=options)


def test_no_request_fails_while_versions_change(plans: list[Path]) -> None:
    outcome = under_load(plans, clients=4, pause_s=0.2)
    assert (outcome["failed"], outcome["wrong"]) == ([], [])
    assert set(outcome["answers_by_version"]) == {"1", "2"}
    by_phase = {phase["phase"]: phase["answers_by_version"] for phase in outcome["phases"]}
    assert by_phase["publish version 2"].keys() == {"1"}, "a published version is not served"
    assert by_phase["version 2 alone"]["1"] == 0
    assert by_phase["version 1 again"]["2"] == 0
    assert [(event["step"], event["version"], event["answered_by"]) for event in outcome["ledger"]] == [
        ("publish", 1, None),
        ("publish", 2, None),
        ("promote", 2, {"2": 2}),
        ("rollback", 1, {"1": 2}),
    ]


def test_a_kill_leaves_one_version_or_the_other(plans: list[Path]) -> None:
    outcome = under_kills(plans, kills=6, seed=1, serve=False)
    assert outcome["broken"] == []
    assert outcome["kills"] == 6


_KILLED = """
import os, signal, sys
from trtdeploy.triton.repository import live_promotion as promotion
repository, name, version, url, moment = sys.argv[1:]
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
if moment == "candidate is loaded":
    promotion._test = kill
else:
    activate = promotion.activate
    promotion.activate = lambda *args, **options: (activate(*args, **options), kill())
promotion.promote_live(repository, name, int(version), url=url)
"""


def test_the_next_promotion_mends_what_a_killed_one_has_left(plans: list[Path], tmp_path: Path) -> None:
    repository = tmp_path / "models"
    publish(plans[0], repository, NAME)
    with explicit(repository) as server, connect(server.grpc_url) as client:
        publish(plans[1], repository, NAME)
        check = ("check", str(repository), "--url", server.http_url)
        target = ServedTarget(client, NAME)  # which leaves the version to the server
        for moment, old, new, words in (
            ("candidate is loaded", 1, 2, "is loaded: a promotion was killed"),
            ("config is written", 2, 1, "Served is version 2; the repository names 1"),
        ):
            done = CliRunner().invoke(app, check)
            assert (done.exit_code, done.stdout) == (0, "nothing to complain about\n")
            with Clients(server.grpc_url, 2) as asking:
                arguments = [str(repository), NAME, str(new), server.http_url, moment]
                killed = subprocess.run([sys.executable, "-c", _KILLED, *arguments], timeout=300, check=False)
                assert killed.returncode == -signal.SIGKILL
                found = CliRunner().invoke(app, check)
                assert found.exit_code == 1
                assert len(found.stdout.splitlines()) == 1
                assert words in found.stdout
                np.testing.assert_allclose(target.scores(np.ones((1, 4), np.float32)), old)
                mended = promote_live(repository, NAME, new, url=server.http_url)
                np.testing.assert_allclose(target.scores(np.ones((1, 4), np.float32)), new)
            assert (asking.failed, asking.wrong) == ([], [])
            assert (mended.version, mended.answered_by) == (new, {str(new): 2})
            assert ModelControl(server.http_url).loaded() == {NAME: [new]}
        assert target.answered_by() == {"1": 2, "2": 2}
        assert target.server_totals() is None  # of which version?


def test_a_failed_promotion_leaves_the_old_version_serving(plans: list[Path], qdq_plan: Plan, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    folder = publish(plans[0], repository, NAME).folder
    with explicit(repository) as server:
        publish(plans[1], repository, NAME)
        before = (folder / "config.pbtxt").read_bytes()
        (folder / "2" / SAMPLE_FILE).write_bytes((folder / "1" / SAMPLE_FILE).read_bytes())
        with Clients(server.grpc_url, 2) as asking:
            with pytest.raises(GateError, match="answers the known sample otherwise"):
                promote_live(repository, NAME, url=server.http_url)
            (folder / "2" / "model.py").write_text("no python")
            with pytest.raises(ServerError, match="refused"):
                promote_live(repository, NAME, url=server.http_url)
        assert (asking.failed, asking.wrong) == ([], [])
        assert set(asking.answered) == {"1"}
        assert active_version(folder) == 1
        assert (folder / "config.pbtxt").read_bytes() == before
