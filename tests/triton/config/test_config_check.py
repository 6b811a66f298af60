"""The checker alone; the same cases go to a real server in tests/triton/config/test_triton_takes_configs.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.triton.config.config_cases import BAD, BASE, GOOD, write_model
from trtdeploy.plan import Plan
from trtdeploy.tensors import TensorSpec
from trtdeploy.triton.config import check_config
from trtdeploy.triton.repository.package import package

pytest.importorskip("tritonclient.grpc")


def errors(config: str, folder: Path | None = None, gpus: int = 0) -> list[str]:
    return [str(finding) for finding in check_config(config, folder, gpus=gpus) if finding.severity == "error"]


@pytest.mark.parametrize("case", GOOD)
def test_what_triton_takes_is_taken(case: str, tmp_path: Path) -> None:
    write_model(tmp_path, "plain", BASE)
    assert errors(GOOD[case], write_model(tmp_path, case, GOOD[case])) == []


@pytest.mark.parametrize("case", BAD)
def test_what_triton_refuses_is_refused(case: str, tmp_path: Path) -> None:
    write_model(tmp_path, "plain", BASE)
    found = errors(BAD[case], write_model(tmp_path, case, BAD[case]))
    assert found
    assert all(len(message) > 20 for message in found)


def test_a_link_out_of_the_repository_is_reported(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "models", "plain", BASE)
    (tmp_path / "secret").write_text("x")
    (folder / "1" / "more").symlink_to(tmp_path / "secret")
    assert "leads out of the repository" in errors(BASE, folder)[0]


def test_a_config_that_the_plan_cannot_serve_is_reported(qdq_plan: Plan, tmp_path: Path) -> None:
    folder = package(qdq_plan.path, tmp_path / "models", "m").folder
    text = (folder / "config.pbtxt").read_text()
    assert errors(text, folder) == []
    for changed, words in (
        (text.replace("max_batch_size: 32", "max_batch_size: 64"), "cover 32"),
        (text.replace("TYPE_FP32", "TYPE_FP16"), "TYPE_FP16"),
        (text.replace('"logits"', '"scores"'), "logits"),
        (text.replace("dims: 10", "dims: 11"), "do not fit"),
        (text.replace("KIND_CPU", "KIND_GPU"), "plan for a CPU"),
    ):
        assert changed != text
        assert any(words in message for message in errors(changed, folder, gpus=1))


@pytest.mark.parametrize(("count", "severity"), [(9, "error"), (11, "warning")])
def test_a_plan_whose_labels_are_not_as_many_as_its_scores_is_reported(
    count: int, severity: str, qdq_plan: Plan, tmp_path: Path
) -> None:
    folder = package(qdq_plan.path, tmp_path / "models", "m").folder
    facts = qdq_plan.manifest.model_copy(update={"labels": tuple(f"class {index}" for index in range(count))})
    (folder / "1" / "engine.plan.json").write_text(facts.to_json())
    found = check_config((folder / "config.pbtxt").read_text(), folder, gpus=0)
    assert [(finding.severity, finding.message) for finding in found] == [
        (severity, f"version 1 scores 10 classes and has {count} labels.")
    ]
    boxes = TensorSpec(name="logits", dtype="float32", shape=(-1, 10, 4))
    (folder / "1" / "engine.plan.json").write_text(facts.model_copy(update={"outputs": (boxes,)}).to_json())
    assert "labels" not in str(check_config((folder / "config.pbtxt").read_text(), folder, gpus=0))


def test_a_config_for_a_gpu_may_be_checked_without_one() -> None:
    config = BASE.replace('"python"', '"tensorrt"') + ' instance_group { kind: KIND_GPU profile: "0" gpus: [ 1 ] }'
    assert errors(config + ' name: "m"') == []
    assert "no GPU [1]" in errors(config + ' name: "m"', gpus=1)[0]


@pytest.mark.parametrize("place", ["default_queue_policy", "priority_queue_policy[2]"])
def test_timeouts_of_requests_that_triton_would_ignore_are_reported(place: str) -> None:
    text = BASE + " dynamic_batching { priority_levels: 2 default_priority_level: 1 %s }"
    policy = "allow_timeout_override: true %s"
    key = (
        "default_queue_policy { %s }"
        if place.startswith("default")
        else "priority_queue_policy { key: 2 value { %s } }"
    )

    def warnings(timeout: str) -> list[str]:
        found = map(str, check_config(text % (key % (policy % timeout)), gpus=0))
        return [message for message in found if "allow_timeout_override" in message]

    (found,) = warnings("")
    assert found.startswith(f"warning: dynamic_batching.{place}.allow_timeout_override: ")
    assert warnings("default_timeout_microseconds: 5000000") == []
