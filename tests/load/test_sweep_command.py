"""``trtdeploy load --sweep`` with real servers: interrupted, gone on with, and applied."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cli.commands import LIMIT_S, descendants, is_running, started, wait_until
from trtdeploy.cli.main import app
from trtdeploy.plan import Plan
from trtdeploy.triton.config import PackageOptions
from trtdeploy.triton.repository.package import package

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("pytriton")

# as fast as can be, and stable whatever else the machine does
QUICK = ("--warm-up", 0.1, "--window", 0.2, "--max-windows", 3, "--stability-percent", 10000)
SPACE = """
instances: [1]
max_batch_size: [8, 64]
preferred_batch_sizes: [[]]
max_queue_delay_us: [0]
concurrency: [2]
"""


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_a_sweep_from_its_interruption_to_a_better_config(qdq_plan: Plan, tmp_path: Path) -> None:
    models, results, plot = tmp_path / "models", tmp_path / "r.jsonl", tmp_path / "pareto.png"
    # batches of two wait for others that never come: whatever does not wait is faster
    package(qdq_plan.path, models, "digits", options=PackageOptions(max_queue_delay_us=100_000))
    config = models / "digits" / "config.pbtxt"
    deployed = config.read_text()
    (tmp_path / "space.yaml").write_text(SPACE)
    sweep = ["load", "--sweep", tmp_path / "space.yaml", "--repository", models, "--model", "digits", *QUICK]
    sweep += ["--results", results]

    with started(*sweep) as process:
        wait_until(lambda: results.exists() and len(results.read_text().splitlines()) == 2, "a load was measured")
        children = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert "minutes" in said
    wait_until(lambda: not any(map(is_running, children)), "its servers have ended")

    assert invoke(*sweep).exit_code == 2  # there are results
    looked = invoke(*sweep, "--resume", "--json", "--plot", plot)
    assert looked.exit_code == 0, looked.output
    facts = json.loads(looked.stdout)
    assert [(point["candidate"]["max_batch_size"], point["pareto"]) for point in facts["points"]] == [
        (32, False),
        (8, True),
    ]
    assert [refused["candidate"]["max_batch_size"] for refused in facts["refused"]] == [64]
    assert (facts["confirmed"], facts["applied"]) == (None, None)
    assert config.read_text() == deployed
    assert plot.read_bytes().startswith(b"\x89PNG")

    impossible = invoke(*sweep, "--resume", "--json", "--slo-p99-ms", 0.01)
    assert impossible.exit_code == 1
    assert "No candidate keeps p99 <= 0.01 ms" in impossible.stderr
    assert json.loads(impossible.stdout)["choice"] is None

    applied = invoke(*sweep, "--resume", "--apply", "--slo-p99-ms", 90)
    assert applied.exit_code == 0, applied.output
    assert "1 instance, batch 32, delay 100000 us -> 1 instance, batch 8" in applied.stdout
    check = ["package", qdq_plan.path, "--name", "digits", "--repository", models, "--check"]
    assert invoke(*check, "--max-batch-size", 8).exit_code == 0
    again = invoke(*sweep, "--resume")
    assert again.exit_code == 2
    assert "config_sha256" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--sweep", "--model", "m"], 2, "--repository"),
        (["--sweep", "--repository", "nowhere", "--model", "m"], 2, "There is no model 'm'"),
        (["--sweep", "--repository", "models", "--model", "../m"], 2, "cannot be a model's name"),
        (["--sweep", "nospace.yaml", "--repository", "models", "--model", "m"], 2, "nospace.yaml cannot be read"),
        (["--sweep=bad.yaml", "--repository", "models", "--model", "m"], 2, "instance_count"),
        (["--sweep", "--repository", "models", "--model", "m", "--plot", "p.pdf"], 2, ".png or .svg"),
        (["--sweep", "--repository", "models", "--model", "m", "--url", "grpc://127.0.0.1:1"], 2, "--url"),
        (["--sweep", "--repository", "models", "--model", "m", "--tritonserver", "none"], 3, "tritonserver"),
    ],
)
def test_wrong_usage(
    arguments: list[str], code: int, words: str, qdq_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    package(qdq_plan.path, "models", "m")
    Path("bad.yaml").write_text("instance_count: [1]\n")
    done = invoke("load", *arguments)
    assert done.exit_code == code, done.output
    assert words in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.glob("*.jsonl"))


def test_the_help_of_the_sweep_is_its_own() -> None:
    sweep, load = invoke("load", "--sweep", "--help").stdout, invoke("load", "--help").stdout
    assert "--apply" in sweep
    assert "--apply" not in load
    assert "--sweep" in load
