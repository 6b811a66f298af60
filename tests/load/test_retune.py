"""Serving a deployed model with other options: what is derived, what is refused, what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtdeploy.errors import ModelError, RepositoryError
from trtdeploy.load.sweep.retune import deployed_model, retune
from trtdeploy.plan import Plan
from trtdeploy.triton.config import PackageOptions, check_config
from trtdeploy.triton.config.options import Priorities, QueuePolicy, RateLimiter, Resource, VersionPolicy, Warmup
from trtdeploy.triton.pipeline import package_pipeline
from trtdeploy.triton.repository.differences.deployed import compare
from trtdeploy.triton.repository.layout import active_version, read_config
from trtdeploy.triton.repository.package import package
from trtdeploy.triton.repository.versions import promote, publish, rollback

pytest.importorskip("tritonclient.grpc")

TWO = {"instances": 2, "max_batch_size": 16, "max_queue_delay_us": 300}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


def changed(options: PackageOptions, **values: Any) -> PackageOptions:
    return options.model_copy(update=values or TWO)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    np.save(tmp_path / "sample.npy", np.ones((3, 32, 32), np.float32))
    return tmp_path / "sample.npy"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_size": 1},
        {"instances": 3, "contexts": 2, "max_queue_delay_us": 100, "preferred_batch_sizes": (4, 8)},
        {"response_cache": True, "preserve_ordering": True, "version_policy": VersionPolicy(all=True)},
        {"version_policy": VersionPolicy(latest=2), "queue_policy": QueuePolicy(max_queue_size=9, timeout_us=5)},
        {
            "priorities": Priorities(levels=3, default=2, queue_policy={1: QueuePolicy(timeout_action="DELAY")}),
            "rate_limiter": RateLimiter(resources=(Resource(name="r", count=2, shared=True),), priority=4),
        },
    ],
)
def test_the_way_back_from_a_config_leads_to_its_options(options: dict[str, Any], qdq_plan: Plan, models: Path) -> None:
    asked = PackageOptions.model_validate(options)
    package(qdq_plan.path, models, "m", options=asked)
    with deployed_model(models, "m") as deployed:
        assert changed(deployed.options, max_batch_size=asked.max_batch_size) == asked
        assert deployed.derive(deployed.options) == read_config(models / "m")


def test_a_retuned_model_is_what_package_would_have_written(qdq_plan: Plan, models: Path, sample: Path) -> None:
    warm = PackageOptions(max_batch_size=8, contexts=2, warmup=Warmup(samples={"input": sample}, count=2))
    package(qdq_plan.path, models, "m", options=warm)
    with deployed_model(models, "m") as deployed:
        before, after = retune(deployed, changed(deployed.options))
    assert before != after
    assert (models / "m" / "config.pbtxt").read_text() == after
    assert compare(qdq_plan.path, models, "m", changed(warm)).same
    assert "batch-16" in after  # warm-up follows the largest batch
    assert not [f for f in check_config(after, models / "m") if f.severity == "error"]


def test_a_copy_is_served_differently_and_the_repository_stays_as_it_is(
    qdq_plan: Plan, models: Path, sample: Path
) -> None:
    publish(qdq_plan.path, models, "m", options=PackageOptions(warmup=Warmup(samples={"input": sample})))
    publish(qdq_plan.path, models, "m")
    kept = contents(models)
    with deployed_model(models, "m") as deployed:
        with deployed.copied(changed(deployed.options)) as copy:
            assert [path.name for path in copy.iterdir()] == ["m"]
            assert sorted(path.name for path in (copy / "m").iterdir() if path.is_dir()) == ["1", "warmup"]
            config = read_config(copy / "m")
            assert (config.max_batch_size, config.instance_group[0].count) == (16, 2)
        assert not copy.exists()
    assert contents(models) == kept


def test_versions_go_on_as_before(qdq_plan: Plan, models: Path) -> None:
    publish(qdq_plan.path, models, "m")
    publish(qdq_plan.path, models, "m")
    with deployed_model(models, "m") as deployed:
        assert deployed.version == 1
        retune(deployed, changed(deployed.options))
    folder = models / "m"
    assert active_version(folder) == 1
    events = json.loads((folder / "versions.json").read_text())["events"]
    assert [(event["step"], event["version"]) for event in events][-1] == ("retune", 1)
    assert promote(models, "m", 2).before == 1  # no false alarm about an edit by hand
    assert read_config(folder).instance_group[0].count == 1
    rollback(models, "m")
    assert read_config(folder).instance_group[0].count == 2  # the options stay with their version


def test_a_model_that_has_changed_meanwhile_is_refused(qdq_plan: Plan, models: Path) -> None:
    publish(qdq_plan.path, models, "m")
    with deployed_model(models, "m") as deployed:
        publish(qdq_plan.path, models, "m")
        retune(deployed, changed(deployed.options))  # one more version that is not served changes nothing
    with deployed_model(models, "m") as deployed:
        promote(models, "m", 2)
        kept = contents(models)
        with pytest.raises(RepositoryError, match="its config, the served version"):
            retune(deployed, changed(deployed.options, instances=3))
        assert contents(models) == kept


def test_an_edit_by_hand_is_shown_and_not_lost(qdq_plan: Plan, models: Path) -> None:
    config = package(qdq_plan.path, models, "m").folder / "config.pbtxt"
    config.write_text(config.read_text() + 'parameters { key: "mine" value { string_value: "x" } }\n')
    with pytest.raises(RepositoryError, match=r"(?s)has been edited.*\+.*mine"), deployed_model(models, "m"):
        pass


def test_an_ensemble_keeps_its_batches(qdq_plan: Plan, models: Path) -> None:
    package_pipeline(qdq_plan.path, models, "m", options=PackageOptions(max_batch_size=8))
    with deployed_model(models, "m") as deployed:
        assert deployed.ensembles == {"m_pipeline": 8}
        with pytest.raises(ModelError, match="m_pipeline sends batches of up to 8"):
            deployed.derive(changed(deployed.options, max_batch_size=4))
        retune(deployed, changed(deployed.options))
    with pytest.raises(RepositoryError, match="is an ensemble"), deployed_model(models, "m_pipeline"):
        pass


def test_what_the_plan_cannot_do_is_refused_before_anything_is_written(qdq_plan: Plan, models: Path) -> None:
    package(qdq_plan.path, models, "m")
    kept = contents(models)
    with deployed_model(models, "m") as deployed:
        for values in ({"max_batch_size": 64}, {"preferred_batch_sizes": (33,)}, {"gpus": (0,)}):
            with pytest.raises(ModelError):
                retune(deployed, changed(deployed.options, **values))
    assert contents(models) == kept
    with pytest.raises(RepositoryError, match="no model 'n'"), deployed_model(models, "n"):
        pass
