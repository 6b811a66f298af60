from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner

from training.checkpoints.checkpoint import load_checkpoint
from training.cli.main import app
from trtdeploy.ledger import Ledger

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TINY = ["--model", "tiny_model:tiny", "--image-size", "16"]


def run(*arguments, code=0):
    """Run a command in this process and return (stdout, stderr)."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stdout, result.stderr


def command(*arguments):
    """Return how to start a command as a user does, from the folder that holds tiny_model.py."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {
        "args": [sys.executable, "-m", "training", *map(str, arguments)],
        "cwd": HERE,
        "env": environment,
        "text": True,
    }


def test_the_whole_road_with_one_ledger(tmp_path):
    ledger = tmp_path / "ledger.json"
    options = ["--ledger", ledger, "--json"]
    files = {name: tmp_path / f"{name}.safetensors" for name in ("float", "ptq", "qat")}
    model = tmp_path / "model.onnx"

    fast = ["--learning-rate", "1e-2", "--epochs", "5", "--shift", "1"]
    fitted = json.loads(run("fit", "-o", files["float"], *TINY, *fast, *options)[0])
    assert fitted["kind"] == "float"
    assert fitted["ledger"]["top1"]["value"] > 75
    run("calibrate", files["float"], "-o", files["ptq"], "--method", "max", *options)
    tuned = json.loads(run("qat", files["ptq"], "-o", files["qat"], "--epochs", "2", *options)[0])
    assert tuned["dev"]["top1"] >= 75
    assert tuned["training"]["epochs"] == 2
    exported = json.loads(run("export", files["qat"], "-o", model, *options)[0])
    assert exported["quantize_nodes"] == 7

    stages = Ledger(ledger).stages
    assert list(stages) == ["float", "ptq", "qat", "onnx"]
    assert stages["onnx"].agreement > 99
    assert stages["onnx"].top1.value == pytest.approx(stages["qat"].top1.value, abs=0.6)
    for stage, record in stages.items():
        assert record.n == 359
        assert record.latency_ms > 0
        assert record.source["command"].startswith("training ")
        calibration = None if stage == "float" else load_checkpoint(files["ptq"]).facts.calibration
        assert record.source.get("calibration_pixels_sha256") == (calibration and calibration.pixels_sha256)
        assert record.source.get("calibration_ids_sha256") == (calibration and calibration.image_ids_sha256)
        path = model if stage == "onnx" else files[stage]
        assert record.source["file"] == str(path)
    assert json.loads(ledger.read_text())["dataset"]["name"] == "digits"

    scored = json.loads(run("evaluate", files["qat"], "--json")[0])
    assert scored["top1"]["value"] == stages["qat"].top1.value
    text = run("evaluate", files["qat"])[0]
    assert text.startswith(f"test top-1 {scored['top1']['value']:.2f}% [")


def test_a_foreign_float_checkpoint_gets_its_stage_from_calibrate(digits, float_file, tmp_path):
    from safetensors.torch import save_file

    foreign = tmp_path / "foreign.safetensors"
    save_file(load_checkpoint(float_file).model.state_dict(), foreign)
    ledger = tmp_path / "ledger.json"
    run("calibrate", foreign, "-o", tmp_path / "ptq.safetensors", *TINY, "--ledger", ledger)
    stages = Ledger(ledger).stages
    assert list(stages) == ["float", "ptq"]
    assert stages["float"].source["file"] == str(foreign)
    run("evaluate", foreign, *TINY, "--ledger", ledger, "--stage", "float")
    assert Ledger(ledger).stages["float"].top1 == stages["float"].top1


def test_calibrate_with_every_method(float_file, tmp_path):
    output = tmp_path / "p.safetensors"
    arguments = ["calibrate", float_file, "-o", output, "--method", "all", "--images", "50"]
    facts = json.loads(run(*arguments, "--json")[0])
    tried = facts["calibration"]["candidates"]
    assert facts["dev"] == max((one["dev"] for one in tried), key=lambda dev: (dev["top1"], -dev["loss"]))
    text = run(*arguments)[0]
    lines = [line.split() for line in text.splitlines()]
    assert lines[1] == ["method", "dev", "top-1", "%", "dev", "loss"]
    for one, line in zip(tried, lines[2:], strict=True):
        name = [one["method"], *([f"{one['percentile']:g}"] if one["percentile"] else [])]
        assert line[: len(name) + 2] == [*name, f"{one['dev']['top1']:.2f}", f"{one['dev']['loss']:.4f}"]
    assert text.count("chosen") == 1


def test_calibrate_skips_and_corrects(float_file, tmp_path):
    output = tmp_path / "p.safetensors"
    arguments = ["calibrate", float_file, "-o", output, "--skip", "head", "--skip", "stem", "--bias-correction"]
    facts = json.loads(run(*arguments, "--json")[0])
    assert facts["quantization"]["skip"] == ["head", "stem"]
    assert facts["calibration"]["bias_correction"]["corrected"] == 1
    assert "bias correction: 1 layers on 179 images" in run(*arguments)[0]
    assert load_checkpoint(output).facts.quantization.skip == ("head", "stem")


def test_a_folder_of_images(colours, tmp_path):
    output = tmp_path / "colours.safetensors"
    arguments = ["--data", colours, *TINY, "--epochs", "8", "--batch-size", "8", "--learning-rate", "1e-2", "--flip"]
    run("fit", "-o", output, *arguments, "--shift", "2")
    assert load_checkpoint(output).facts.labels == ("blue", "green", "red")
    assert load_checkpoint(output).facts.dataset.name == colours.name
    scored = json.loads(run("evaluate", output, "--data", colours, "--json")[0])
    assert (scored["n"], scored["top1"]["value"]) == (12, 100.0)
    run("calibrate", output, "-o", tmp_path / "ptq.safetensors", "--data", colours)
    run("export", tmp_path / "ptq.safetensors", "-o", tmp_path / "m.onnx", "--data", colours)
    properties = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert json.loads(properties["trtdeploy.labels"]) == ["blue", "green", "red"]


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [([], 99, 3), (["--max-steps", "140"], 140, 5), (["--max-steps", "3"], 3, 1), (["--epochs", "1"], 33, 1)],
)
def test_the_length_of_qat(ptq_file, tmp_path, options, steps, epochs):
    training = json.loads(run("qat", ptq_file, "-o", tmp_path / "q.safetensors", "--json", *options)[0])["training"]
    assert (training["steps"], training["epochs"]) == (steps, epochs)


def test_the_split_seed_of_the_checkpoint_is_used_again(tmp_path):
    output = tmp_path / "f.safetensors"
    run("fit", "-o", output, *TINY, "--epochs", "1", "--split-seed", "3")
    run("calibrate", output, "-o", tmp_path / "p.safetensors", "--images", "20")
    before, after = (load_checkpoint(tmp_path / f"{name}.safetensors").facts for name in "fp")
    assert before.dataset == after.dataset
    assert after.dataset.split_seed == 3
    assert after.calibration.images == 20


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fit", "-o", "x.onnx"], "must end in .safetensors"),
        (["fit", "-o", "x.safetensors", "--data", "nowhere"], "There is no dataset at nowhere"),
        (["fit", "-o", "x.safetensors", "--model", "resnet"], "'resnet' is no model"),
        (["fit", "-o", "x.safetensors", "--resume"], "no unfinished run"),
        (["fit", "-o", "x.safetensors", "--learning-rate", "-1", *TINY], "learning_rate"),
        (["fit", "-o", "x.safetensors", "--learning-rate", "nan", *TINY], "learning_rate"),
        (["fit", "-o", "x.safetensors", "--learning-rate", "1e30", *TINY], "The loss is"),
        (["fit", "-o", "x.safetensors", "--epochs", "0"], "--epochs"),
        (["fit", "-o", "x.safetensors", "--batch-size", "1"], "--batch-size"),
        (["fit", "-o", "x.safetensors", "--checkpoint", "none.pt"], "no checkpoint at none.pt"),
        (["calibrate", "none.pt", "-o", "x.safetensors"], "no checkpoint at none.pt"),
        (["calibrate", "FLOAT", "-o", "x.safetensors", "--method", "kl"], "--method"),
        (
            ["calibrate", "FLOAT", "-o", "x.safetensors", "--method", "percentile", "--percentile", "101"],
            "--percentile 101 is not between",
        ),
        (["calibrate", "FLOAT", "-o", "x.safetensors", "--percentile", "99"], "means nothing to --method relative-mse"),
        (["calibrate", "FLOAT", "-o", "x.safetensors", "--skip", "hed"], "--skip hed matches no layer"),
        (["calibrate", "PTQ", "-o", "x.safetensors"], "quantized already"),
        (["qat", "FLOAT", "-o", "x.safetensors"], "starts from a calibrated one"),
        (["calibrate", "FLOAT", "-o", "FLOAT"], "would replace the input"),
        (["qat", "PTQ", "-o", "PTQ"], "would replace the input"),
        (["qat", "PTQ", "-o", "FLOAT", "--teacher", "FLOAT"], "would replace the input"),
        (["fit", "-o", "FLOAT", "--checkpoint", "FLOAT"], "would replace the input"),
        (["fit", "-o", "x.safetensors", "--ledger", __file__], "is not a ledger"),
        (["export", "PTQ", "-o", "x.safetensors"], "must end in .onnx"),
        (["export", "PTQ", "-o", "x.onnx", "--opset", "9"], "--opset 9"),
        (["evaluate", "PTQ", "--data", "COLOURS"], "classes that the model does not know"),
        (["evaluate", "PTQ", "--split", "dev", "--ledger", "l.json"], "cannot be recorded"),
        (["evaluate", "PTQ", "--ledger", "BROKEN"], "is not a ledger"),
        (["evaluate", "BROKEN"], "broken"),
    ],
)
def test_wrong_use_is_one_message_and_exit_code_2(
    float_file, ptq_file, colours, tmp_path, monkeypatch, arguments, expected
):
    monkeypatch.chdir(tmp_path)
    Path("broken").write_text("broken")
    places = {"FLOAT": float_file, "PTQ": ptq_file, "COLOURS": colours, "BROKEN": "broken"}
    _, stderr = run(*(places.get(argument, argument) for argument in arguments), code=2)
    assert expected in " ".join(stderr.split())
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["broken"]


def test_an_output_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    _, stderr = run("fit", "-o", tmp_path / "file" / "x.safetensors", *TINY, "--epochs", "1", code=2)
    assert "file" in stderr


def test_ctrl_c_keeps_the_last_epoch_and_says_how_to_go_on(tmp_path):
    output = tmp_path / "f.safetensors"
    arguments = ["fit", "-o", output, *TINY, "--epochs", "200"]
    with subprocess.Popen(**command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 300
            while not (tmp_path / "f.resume.pt").exists():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "--resume" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert not output.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.metrics.jsonl", "f.resume.pt"]


def test_facts_go_to_stdout_and_progress_to_stderr(tmp_path):
    arguments = ["fit", "-o", tmp_path / "f.safetensors", *TINY, "--epochs", "1", "--json"]
    result = subprocess.run(**command(*arguments), capture_output=True, timeout=400)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["model"] == "tiny_model:tiny"
    [line] = result.stderr.splitlines()
    assert line.startswith("epoch 1/1  loss ")


def test_help_does_not_import_torch():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from training.cli.main import app\n"
        "for name in ('fit', 'calibrate', 'qat', 'export', 'evaluate'):\n"
        "    assert CliRunner().invoke(app, [name, '--help']).exit_code == 0\n"
        "print({'torch', 'onnx', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "set()"
