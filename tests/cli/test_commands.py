"""Every command as a user types it: help, options, messages, exit codes, signals and closed pipes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from tests.cli.commands import COMMAND, LIMIT_S, cpu_seconds_of, run, started, wait_until
from trtdeploy.cli.main import app
from trtdeploy.ledger import Ledger
from trtdeploy.plan import Plan, manifest_path, read_plan

COMMANDS = [
    *(
        "quickstart",
        "doctor",
        "quantize",
        "lint",
        "build",
        "cache",
        "inspect",
        "run",
        "bench",
        "package",
        "serve",
        "validate",
        "load",
    ),
    "train",
    "ledger",
    *("publish", "promote", "rollback", "versions", "prune", "check"),
]
INPUT = "input=random"


def invoke(*arguments: object) -> Any:
    """Run a command in this process: the same parser and the same error handling, without the start."""
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def here(tmp_path: Path, qdq_plan: Plan, qdq_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a user who has a model and its plan."""
    monkeypatch.chdir(tmp_path)
    for source in (qdq_plan.path, manifest_path(qdq_plan.path)):
        (tmp_path / source.name.replace("classifier", "m")).write_bytes(source.read_bytes())
    (tmp_path / "m.onnx").write_bytes(qdq_onnx.read_bytes())
    (tmp_path / "garbage").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 32, 32), np.float32))
    return tmp_path


def files(folder: Path) -> set[str]:
    """What lies there, except for locks, and for the session file that ONNX Runtime keeps among the temporary ones."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in names if not name.endswith((".lock", "tmp/.ses"))}


def test_every_command_is_covered_here() -> None:
    listed = invoke("--help").stdout
    names = re.findall(r"^[│ ]+([a-z]+)  +\S", listed.partition("Commands")[2], re.MULTILINE)
    assert set(names) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command: str) -> None:
    done = invoke(command, "--help")
    assert done.exit_code == 0
    assert "Usage" in done.stdout
    if command == "cache":
        assert all("--json" in invoke(command, name, "--help").stdout for name in ("show", "merge"))
    elif command == "ledger":
        assert all("--json" in invoke(command, name, "--help").stdout for name in ("show", "diff"))
    elif command == "train":
        for name in ("fit", "calibrate", "qat", "export", "evaluate", "sensitivity", "auto"):
            explained = invoke(command, name, "--help")
            assert explained.exit_code == 0
            assert explained.stdout == invoke(command, name, "-h").stdout
    elif command != "quickstart":  # which has a folder and a table of its own
        assert "--json" in done.stdout
    assert done.stdout == invoke(command, "-h").stdout
    assert not re.search(r"\w \.\s", done.stdout), "words were taken for markup"


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    def ask() -> None:
        assert run("build", "--help").returncode == 0

    assert min(cpu_seconds_of(ask) for _ in range(3)) < 2
    code = "import sys; from trtdeploy.cli.main import app; print(*sys.modules)"
    done = subprocess.run([*COMMAND[:1], "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert not {"torch", "onnxruntime", "tritonclient", "grpc"} & set(done.stdout.split())


def test_the_version_is_printed() -> None:
    assert invoke("--version").stdout.startswith("trtdeploy ")


@pytest.mark.parametrize(
    "command", [[name] for name in COMMANDS] + [[]], ids=lambda command: command[0] if command else "app"
)
def test_an_unknown_option_ends_with_exit_code_2(command: list[str]) -> None:
    done = invoke(*command, "--no-such-option")
    assert done.exit_code == 2
    assert "--no-such-option" in done.stderr
    assert done.stdout == ""


def test_names_with_brackets_are_shown_as_they_are(here: Path) -> None:
    folder = here / "a["
    folder.mkdir()
    for name in ("a[/b]c.timing", "x[bold]y.timing"):
        (here / name).write_bytes(b"")
        done = invoke("cache", "show", name)
        assert done.exit_code == 1, done.stderr
        assert name in done.stdout


def test_an_unknown_command_ends_with_exit_code_2() -> None:
    assert invoke("deploy").exit_code == 2


BAD: list[tuple[str, str]] = [
    ("build absent.onnx -o out.plan", "absent.onnx cannot be read"),
    ("build folder -o out.plan", "folder"),
    ("build garbage -o out.plan", "garbage is not an ONNX model"),
    ("build x.npy -o out.plan", "x.npy is not an ONNX model"),
    ("build m.plan.json -o out.plan", "m.plan.json is not an ONNX model"),
    ("build m.onnx -o folder", "is a directory"),
    ("build m.onnx -o garbage/out.plan", "garbage"),
    ("build m.onnx -o m.onnx", "would replace the input m.onnx"),
    ("lint m.onnx --fix m.onnx", "would replace the input m.onnx"),
    ("quantize m.onnx -o m.onnx --data digits", "would replace the input m.onnx"),
    ("quantize m.onnx -o out.onnx --data digits --preprocessing garbage", "garbage is no preprocessing specification"),
    ("run m.plan -i input=random -o m.plan", "would replace the input m.plan"),
    ("run m.plan -i input=x.npy -o x.npy", "would replace the input x.npy"),
    ("build m.onnx", "--output"),
    ("build m.onnx -o out.plan --runtime cuda", "runtime"),
    ("build m.onnx -o out.plan --shape input", "NAME=MIN:OPT:MAX"),
    ("build m.onnx -o out.plan --shape image=1x3x32x32", "image"),
    ("build m.onnx -o out.plan --shape input=1x3x16x16", "does not fit"),
    ("build m.onnx -o out.plan --shape input=2x3x32x32:1x3x32x32:4x3x32x32", "min <= opt <= max"),
    ("build m.onnx -o out.plan --config absent.yaml", "absent.yaml"),
    ("build m.onnx -o out.plan --config garbage", "garbage"),
    ("build m.onnx -o out.plan --config unknown.yaml", "unknown_key"),
    ("build m.onnx -o out.plan --threads 0", "--threads"),
    ("build m.onnx -o out.plan --ledger garbage", "garbage is not a ledger"),
    ("build m.onnx -o out.plan --ledger absent.json", "absent.json"),
    ("build m.onnx -o out.plan --timing-cache garbage/b.timing", "garbage"),
    ("build m.onnx -o out.plan --timing-cache b.timing --timing-cache-mode verify", "verify"),
    ("cache show absent", "absent"),
    ("cache merge garbage -o out.timing", "garbage"),
    ("inspect absent", "absent"),
    ("inspect garbage", "garbage is not an ONNX model"),
    ("inspect .", "is a directory"),
    ("inspect /", "is a directory"),
    ("inspect cut.plan", "cut.plan is not the one that its manifest describes"),
    ("run m.plan", "--input"),
    ("run absent.plan -i input=random", "There is no plan at absent.plan"),
    ("run alone.plan -i input=random", "alone.plan has no readable manifest"),
    ("run cut.plan -i input=random", "cut.plan is not the one that its manifest describes"),
    ("run m.plan -i input", "NAME=FILE.npy"),
    ("run m.plan -i image=random", "image"),
    ("run m.plan -i input=absent.npy", "absent.npy"),
    ("run m.plan -i input=garbage", "garbage is not a .npy file"),
    ("run m.plan -i input=absent.png", "absent.png cannot be read"),
    ("run m.plan -i input=wrong.npy", "dtype float64; this engine takes float32"),
    ("run m.plan -i input=random -o folder", "is a directory"),
    ("bench absent.plan", "There is no plan at absent.plan"),
    ("bench m.plan --batch 0", "positive"),
    ("bench m.plan --batch 33", "33"),
    ("bench m.plan --contexts -1", "contexts"),
    ("bench m.plan --duration nan", "--duration"),
    ("bench m.plan --duration inf", "--duration"),
    ("bench m.plan --duration 0", "--duration"),
    ("bench m.plan --warm-up nan", "--warm-up"),
    ("package absent.plan --name m --repository models", "There is no plan at absent.plan"),
    ("package cut.plan --name m --repository models", "cut.plan is not the one"),
    ("package m.plan --name ../m --repository models", "cannot be a model's name"),
    ("package m.plan --name m --repository models --version 0", "Version 0"),
    ("package m.plan --name m --repository models --max-batch-size 64", "larger than what the plan's profiles cover"),
    ("package m.plan --name m --repository garbage", "garbage"),
    ("package m.plan --repository models", "--name"),
    ("package m.plan --name m --repository models --config unknown.yaml", "unknown_key"),
    ("publish m.plan --name m/../m --repository models", "cannot be a model's name"),
    ("publish m.plan --name m --repository models --sample image=x.npy", "NAME=FILE.npy"),
    ("promote --name m --repository models", "There is no model"),
    ("rollback --name m --repository models", "There is no model"),
    ("versions --name m --repository models", "There is no model"),
    ("prune --name m --repository models", "There is no model"),
    ("check models", "There is no model repository"),
    ("validate --data digits", "Give --url and --model"),
    ("validate --data digits --url http://127.0.0.1:1", "Give --url and --model"),
    ("validate --data digits --url ftp://127.0.0.1:1 --model m", "is not the URL of a Triton server"),
    ("validate --data garbage --plan m.plan", "garbage is neither a folder nor"),
    ("validate --data digits --plan absent.plan", "There is no plan at absent.plan"),
    ("validate --data digits --plan m.plan --reference garbage", "garbage is not an ONNX model"),
    ("validate --data digits --plan m.plan --ledger garbage", "garbage is not a ledger"),
    ("validate --data digits --plan m.plan --preprocessing garbage", "garbage is no preprocessing specification"),
]


@pytest.mark.parametrize(("line", "words"), BAD, ids=[line for line, _ in BAD])
def test_wrong_input_ends_with_exit_code_2_a_message_and_no_files(line: str, words: str, here: Path) -> None:
    (here / "unknown.yaml").write_text("unknown_key: 1\n")
    (here / "alone.plan").write_bytes((here / "m.plan").read_bytes())
    (here / "cut.plan").write_bytes((here / "m.plan").read_bytes()[:-1])
    (here / "cut.plan.json").write_bytes((here / "m.plan.json").read_bytes())
    np.save(here / "wrong.npy", np.zeros((1, 3, 16, 16)))
    before = files(here)
    done = invoke(*line.split())
    assert done.exit_code == 2, (done.output, done.exception)
    flat = " ".join(done.stderr.replace("│", " ").split())
    assert words in flat
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert files(here) == before


@pytest.mark.parametrize("url", ["grpc://127.0.0.1:1", "http://127.0.0.1:1"])
def test_a_server_that_is_not_there_ends_with_exit_code_3(url: str, here: Path) -> None:
    done = invoke("validate", "--data", "digits", "--url", url, "--model", "m", "--ledger", "ledger.json")
    assert done.exit_code == 3
    assert url in done.stderr
    assert "Is it running" in done.stderr
    assert not (here / "ledger.json").exists()


def test_files_that_may_not_be_read_end_with_exit_code_2(here: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    for name in ("m.onnx", "m.plan"):
        (here / name).chmod(0)
    for line in ("build m.onnx -o out.plan", "inspect m.plan", f"run m.plan -i {INPUT}"):
        done = invoke(*line.split())
        assert done.exit_code == 2
        assert "ermission denied" in done.stderr


def test_the_road_from_a_model_to_a_repository_in_json(here: Path) -> None:
    built = invoke("build", "m.onnx", "-o", "out.plan", "--timing-rounds", 1, "--timing-cache", "t.json", "--json")
    facts = json.loads(built.stdout)
    assert facts["plan"] == "out.plan"
    assert facts["runtime"]["name"] == "onnxruntime"
    assert json.loads(invoke("build", "m.onnx", "-o", "out.plan", "--timing-cache", "t.json", "--json").stdout)[
        "tactic"
    ]["cached"]
    assert json.loads(invoke("inspect", "m.onnx", "--json").stdout)["kind"] == "onnx"
    assert json.loads(invoke("inspect", "out.plan", "--json").stdout)["runs_here"] is True
    ran = json.loads(invoke("run", "out.plan", "-i", "input=x.npy", "-o", "y.npz", "--json").stdout)
    assert ran["logits"]["shape"] == [1, 10]
    assert np.load("y.npz")["logits"].shape == (1, 10)
    bench = ("bench", "out.plan", "--batch", 1, "--batch", 2, "--contexts", 1, "--contexts", 2)
    points = json.loads(invoke(*bench, "--warm-up", 0, "--duration", 0.05, "--json").stdout)
    assert [(point["batch"], point["contexts"]) for point in points] == [(1, 1), (2, 1), (1, 2), (2, 2)]
    packaged = json.loads(invoke("package", "out.plan", "--name", "m", "--repository", "models", "--json").stdout)
    assert {key: packaged[key] for key in ("name", "version", "folder")} == {
        "name": "m",
        "version": 1,
        "folder": "models/m",
    }
    assert packaged["predicted_memory"]["total_bytes"] == Path("out.plan").stat().st_size
    published = json.loads(invoke("publish", "out.plan", "--name", "m", "--repository", "models", "--json").stdout)
    assert (published["version"], published["active"]) == (2, 1)
    of_model = ("--name", "m", "--repository", "models", "--json")
    promoted = json.loads(invoke("promote", *of_model).stdout)
    assert promoted == {"name": "m", "version": 2, "before": 1, "url": None, "answered_by": {}}
    assert invoke("package", "out.plan", "--check", *of_model).exit_code == 0
    assert json.loads(invoke("rollback", *of_model).stdout)["version"] == 1
    assert [entry["active"] for entry in json.loads(invoke("versions", *of_model).stdout)] == [True, False]
    assert json.loads(invoke("prune", *of_model, "--keep", 0).stdout) == {"removed": []}  # both may be needed
    differs = invoke("package", "out.plan", "--check", *of_model, "--instances", 2)
    assert differs.exit_code == 1
    assert "+  count: 2" in json.loads(differs.stdout)["config_diff"]
    assert json.loads(invoke("check", "models", "--json").stdout) == []
    config = Path("models/m/config.pbtxt")
    config.write_text(config.read_text().replace("KIND_CPU", "KIND_GPU"))
    refused = invoke("check", "models", "--gpus", 1)
    assert refused.exit_code == 1
    assert "plan for a CPU" in refused.stdout
    validated = invoke("validate", "--data", "digits", "--plan", "out.plan", "--ledger", "l.json", "--json")
    assert json.loads(validated.stdout)["passed"] is True
    assert list(Ledger("l.json").stages) == ["plan"]


def test_what_people_read_says_the_same(here: Path) -> None:
    assert "chosen:" in invoke("build", "m.onnx", "-o", "out.plan", "--timing-rounds", 1).stdout
    assert "qdq_pairs" in invoke("inspect", "m.onnx").stdout
    assert "runs_here" in invoke("inspect", "out.plan").stdout
    assert "logits float32[1, 10]" in invoke("run", "out.plan", "-i", INPUT).stdout
    assert "samples/s" in invoke("bench", "out.plan", "--warm-up", 0, "--duration", 0.05).stdout
    assert "models/n: version 1" in invoke("package", "out.plan", "--name", "n", "--repository", "models").stdout


def test_a_failed_build_leaves_the_old_plan(here: Path) -> None:
    before = (here / "m.plan").read_bytes(), (here / "m.plan.json").read_bytes()
    assert invoke("build", "garbage", "-o", "m.plan").exit_code == 2
    assert ((here / "m.plan").read_bytes(), (here / "m.plan.json").read_bytes()) == before


# signals


def loads_onnxruntime(process: subprocess.Popen[str]) -> bool:
    assert process.poll() is None, "it ended too early"
    return "onnxruntime" in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.parametrize(
    "line",
    ["build m.onnx -o out.plan --timing-rounds 1000000 --timing-cache t.json", "bench m.plan --duration 100000"],
    ids=["build", "bench"],
)
def test_ctrl_c_ends_with_130_and_leaves_nothing(line: str, here: Path) -> None:
    temporary = here / "tmp"
    temporary.mkdir()
    before = files(here)
    with started(*line.split(), cwd=here, env={**os.environ, "TMPDIR": str(temporary)}) as process:
        wait_until(lambda: loads_onnxruntime(process), "the command is at work")
        if line.startswith("build"):  # timing begins when the last optimized graph has been read back
            wait_until(lambda: cpu_seconds(process.pid) > 1.5, "it is timing")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, errors
    assert output == ""
    assert "Traceback" not in errors
    assert errors.strip() == "Interrupted."
    assert files(here) == before


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_ctrl_c_at_any_moment_of_a_build_shows_no_traceback_and_no_half_plan(here: Path) -> None:
    for moment_s in (0.0, 0.05, 0.1, 0.2):
        before = files(here)
        with started("build", "m.onnx", "-o", "out.plan", "--timing-rounds", 300, cwd=here) as process:
            wait_until(lambda process=process: loads_onnxruntime(process), "the command is at work")
            end = cpu_seconds(process.pid) + moment_s
            wait_until(
                lambda process=process, end=end: process.poll() is not None or cpu_seconds(process.pid) >= end, "later"
            )
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=LIMIT_S)
        assert "Traceback" not in errors, errors
        # an interpreter that is ending has no handlers any more: by then the plan is complete
        assert process.returncode in (0, 130, -signal.SIGINT)
        if process.returncode == 130:
            assert files(here) == before
        else:
            read_plan(here / "out.plan")


# a reader that goes away


@pytest.mark.parametrize(
    "line",
    [
        "inspect m.onnx",
        "inspect m.onnx --json",
        "run m.plan -i input=random",
        "bench m.plan --warm-up 0 --duration 0.01",
        "build m.onnx -o out.plan --timing-rounds 1",
        "package m.plan --name m --repository models",
        "validate --data digits --plan m.plan --batch-size 32",
    ],
)
def test_a_reader_that_has_gone_is_no_error_worth_a_word(line: str, here: Path) -> None:
    with started(*line.split(), cwd=here) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, errors = process.communicate(timeout=LIMIT_S)
    assert errors == ""
    assert process.returncode == 141


@pytest.mark.parametrize("line", ["inspect m.onnx", "run m.plan -i input=random"])
def test_a_full_disk_behind_stdout_is_an_error_without_a_traceback(line: str, here: Path) -> None:
    with open("/dev/full", "w") as full, started(*line.split(), cwd=here, stdout=full) as process:
        _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2
    assert "No space left" in errors
    assert "Traceback" not in errors


def test_a_model_with_a_name_of_another_alphabet_is_shown(here: Path) -> None:
    model = onnx.load("m.onnx")
    model.metadata_props.add(key="author", value="Ж")
    onnx.save(model, "модель.onnx")
    done = run("inspect", "модель.onnx", cwd=here, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
