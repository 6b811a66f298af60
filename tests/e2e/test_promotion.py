"""Versions under load and under kills, on a real server; the long form is benchmarks/publish_soak.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.publish_soak import NAME, Clients, make_plans, under_kills, under_load
from trtdeploy.errors import GateError, ServerError
from trtdeploy.plan import Plan
from trtdeploy.triton.installation import find_tritonserver
from trtdeploy.triton.promotion import promote_live
from trtdeploy.triton.sample import SAMPLE_FILE
from trtdeploy.triton.server import TritonServer
from trtdeploy.triton.versions import active_version, publish

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("pytriton")


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_plans(tmp_path_factory.mktemp("plans"))


def test_no_request_fails_while_versions_change(plans: list[Path]) -> None:
    outcome = under_load(plans, clients=4, pause_s=0.2)
    assert (outcome["failed"], outcome["wrong"]) == ([], [])
    assert set(outcome["answers_by_version"]) == {"1", "2"}
    by_phase = {phase["phase"]: phase["answers_by_version"] for phase in outcome["phases"]}
    assert by_phase["publish version 2"].keys() == {"1"}, "a published version is not served"
    assert by_phase["version 2 alone"]["1"] == 0
    assert by_phase["version 1 again"]["2"] == 0
    assert [(event["step"], event["version"]) for event in outcome["ledger"]] == [
        ("publish", 1),
        ("publish", 2),
        ("promote", 2),
        ("rollback", 1),
    ]


def test_a_kill_leaves_one_version_or_the_other(plans: list[Path]) -> None:
    outcome = under_kills(plans, kills=6, seed=1, serve=False)
    assert outcome["broken"] == []
    assert outcome["kills"] == 6


def test_a_failed_promotion_leaves_the_old_version_serving(plans: list[Path], qdq_plan: Plan, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    folder = publish(plans[0], repository, NAME).folder
    options = ["--model-control-mode=explicit", "--load-model=*"]
    with TritonServer(
        repository, find_tritonserver(), http_port=0, grpc_port=0, metrics_port=0, options=options
    ) as server:
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
