from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.training.tiny_model import IMAGE_SIZE, tiny_schedule
from training.auto import decide
from training.checkpoints.checkpoint import load_checkpoint
from training.cli.main import app
from training.loop.epochs import TrainingInterrupted
from training.loop.fit import fit
from training.loop.resume import resume_path_for
from training.predict import predictor
from training.ptq.calibrate import calibrate
from training.quantization import QuantizationSpec, quantizers
from training.recording import score_split
from training.sensitivity import draw_chart, measure_sensitivity
from trtdeploy.errors import UsageError
from trtdeploy.ledger import Ledger


def test_each_layer_is_measured_alone_and_left_out_alone(digits, ptq_file, tmp_path) -> None:
    checkpoint = load_checkpoint(ptq_file)
    found = measure_sensitivity(checkpoint, digits, tmp_path / "s.json")
    names = {row.name: row for row in found.layers}
    assert {"stem", "depthwise", "head"} < set(names)
    assert all(quantizer.enabled for _, quantizer in quantizers(checkpoint.model))
    exact = score_split(predictor(checkpoint.model), checkpoint.facts, digits, split="dev")
    assert found.quantized.top1 == exact.outputs.top1

    # by hand: only the head's two quantizers on
    for _, quantizer in quantizers(checkpoint.model):
        quantizer.disable()
    float_outputs = score_split(predictor(checkpoint.model), checkpoint.facts, digits, split="dev").outputs
    for name, module in checkpoint.model.named_modules():
        if name == "head":
            module.input_quantizer.enable()
            module.weight_quantizer.enable()
    alone = score_split(predictor(checkpoint.model), checkpoint.facts, digits, split="dev").outputs
    assert names["head"].only_quantized.kl == pytest.approx(alone.divergence_from(float_outputs).mean, rel=1e-3)
    assert names["head"].only_quantized.difference == alone.compared_with(float_outputs)
    order = [row.only_quantized.kl for row in found.layers]
    assert order == sorted(order, reverse=True)
    assert json.loads((tmp_path / "s.json").read_text())["images"] == len(digits.split("dev"))


def test_a_layer_with_a_broken_range_comes_first_and_leaving_it_out_brings_the_accuracy_back(
    digits, ptq_file, tmp_path
) -> None:
    checkpoint = load_checkpoint(ptq_file)
    checkpoint.model.get_submodule("depthwise").weight_quantizer.set_amax(torch.full((12, 1, 1, 1), 100.0))
    found = measure_sensitivity(checkpoint, digits, tmp_path / "s.json", images=100)
    worst = found.layers[0]
    assert worst.name == "depthwise"
    assert worst.only_float.kl < found.quantized.kl / 5
    assert worst.only_quantized.sqnr_db is not None
    assert worst.only_quantized.sqnr_db < 15


def test_a_killed_run_goes_on_and_other_settings_start_anew(digits, ptq_file, tmp_path) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 2:
            raise Killed

    output, kept = tmp_path / "s.json", tmp_path / "s.layers.jsonl"
    with pytest.raises(Killed):
        measure_sensitivity(load_checkpoint(ptq_file), digits, output, images=60, progress=kill)
    lines = kept.read_text().splitlines()
    assert len(lines) == 3
    # what is there is believed, a torn line is not
    row = json.loads(lines[1])
    row["only_quantized"]["kl"] = 1234.5
    kept.write_text("\n".join([lines[0], json.dumps(row), lines[2][:40]]))
    found = measure_sensitivity(load_checkpoint(ptq_file), digits, output, images=60)
    assert found.layers[0].only_quantized.kl == 1234.5
    assert not kept.exists()
    kept.write_text("\n".join([lines[0], json.dumps(row), ""]))
    other = measure_sensitivity(load_checkpoint(ptq_file), digits, output, images=61)
    assert other.layers[0].only_quantized.kl < 100


def test_the_command_prints_writes_and_draws(ptq_file, float_file, tmp_path) -> None:
    chart, output = tmp_path / "s.png", tmp_path / "s.json"
    options = ["--images", "50", "-o", str(output), "--chart", str(chart), "--json"]
    done = CliRunner().invoke(app, ["sensitivity", str(ptq_file), *options])
    assert done.exit_code == 0, done.output
    assert {row["name"] for row in json.loads(done.stdout)["layers"]} >= {"stem", "head"}
    with Image.open(chart) as image:
        assert min(image.size) > 200
    assert CliRunner().invoke(app, ["sensitivity", str(ptq_file), "--chart", "x.txt"]).exit_code == 2


def test_a_float_checkpoint_is_calibrated_as_asked_and_a_quantized_one_keeps_its_own(
    float_file, ptq_file, tmp_path
) -> None:
    output = tmp_path / "s.json"
    asked = ["--target", "onnxruntime", "--toolkit", "modelopt", "--skip", "depthwise"]
    arguments = ["sensitivity", str(float_file), "--images", "20", "-o", str(output), "--json"]
    pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt is not installed")
    done = CliRunner().invoke(app, [*arguments, *asked])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    names = {row["name"] for row in facts["layers"]}
    assert "stem" in names
    assert "depthwise" not in names
    calibrated = load_checkpoint(Path(facts["checkpoint"]))
    assert calibrated.path == tmp_path / "s.ptq.safetensors"
    expected = QuantizationSpec(target="onnxruntime", toolkit="modelopt", skip=("depthwise",))
    assert calibrated.facts.quantization == expected
    # the same again is measured on the same network, so that a killed run would go on
    again = json.loads(CliRunner().invoke(app, [*arguments, *asked]).stdout)
    assert again["checkpoint_sha256"] == facts["checkpoint_sha256"]

    measured = ["sensitivity", str(ptq_file), "--images", "20", "-o", str(output)]
    assert CliRunner().invoke(app, [*measured, "--target", "tensorrt"]).exit_code == 0
    for option, value in (("--target", "onnxruntime"), ("--toolkit", "modelopt"), ("--skip", "head")):
        refused = CliRunner().invoke(app, [*measured, option, value])
        assert refused.exit_code == 2
        assert f"is quantized already, with {option[2:]}" in refused.stderr


def test_a_chart_may_be_svg_with_long_names(digits, ptq_file, tmp_path) -> None:
    found = measure_sensitivity(load_checkpoint(ptq_file), digits, tmp_path / "s.json", images=40)
    long = found.layers[0].model_copy(update={"name": "a" * 60 + "the_end"})
    draw_chart(found.model_copy(update={"layers": (long, *found.layers)}), tmp_path / "s.svg")
    assert b"<svg" in (tmp_path / "s.svg").read_bytes()


def test_auto_stops_at_the_first_that_is_shown_and_is_not_repeated(digits, float_file, tmp_path) -> None:
    foreign = tmp_path / "foreign.pt"  # a state dict, as other programs write it
    torch.save(load_checkpoint(float_file).model.state_dict(), foreign)

    def start():
        return load_checkpoint(foreign, model="tiny_model:tiny", image_size=IMAGE_SIZE, dataset=digits)

    said: list[str] = []
    decision = decide(
        digits, start(), tmp_path / "auto", max_drop=12, schedule=tiny_schedule(epochs=1), say=said.append
    )
    assert decision.met
    assert [trial.step for trial in decision.trials] == ["PTQ"]
    assert "QAT" in decision.not_tried
    assert len(decision.winner.variants) >= 2
    assert decision.winner.proof.lower > -12
    page = (tmp_path / "auto" / "decision.md").read_text()
    assert page.splitlines()[2].startswith("PTQ is enough: its drop is shown to be less than 12 points")
    assert (tmp_path / "auto" / "model.onnx").stat().st_size > 1000
    assert decision.test.n == len(digits.split("test"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "auto").glob("*.safetensors")}
    again = decide(digits, start(), tmp_path / "auto", max_drop=12, schedule=tiny_schedule(epochs=1))
    assert again.chosen == decision.chosen
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "auto").glob("*.safetensors")} == before


def test_auto_says_how_many_samples_are_missing_when_nothing_can_be_shown(digits, float_file, tmp_path) -> None:
    decision = decide(
        digits, load_checkpoint(float_file), tmp_path, max_drop=0.5, schedule=tiny_schedule(epochs=1, max_steps=5)
    )
    assert not decision.met
    assert [trial.step for trial in decision.trials][-2:] == ["QAT", "QAT + distillation"]
    assert decision.not_tried == ()
    best = max(trial.difference.difference.value for trial in decision.trials)
    assert decision.winner.difference.difference.value == best
    assert "No candidate's drop is shown" in decision.verdict
    if decision.winner.samples_needed is not None:
        assert decision.winner.samples_needed > len(digits.split("dev"))
        assert str(decision.winner.samples_needed) in decision.verdict
    declared = {share.step: share for share in decision.declared}
    assert [trial.proof.confidence for trial in decision.trials] == [
        declared[trial.step].confidence for trial in decision.trials
    ]
    assert (declared["PTQ"].looks, declared["QAT"].looks) == (1, 4)
    page = (tmp_path / "decision.md").read_text()
    assert "PTQ 50% of the error, 97.5%" in page
    assert "QAT 6.25% of the error, for the best of 4 networks" in page


def test_auto_quantizes_for_its_target_and_goes_on_only_with_the_same_settings(digits, float_file, tmp_path) -> None:
    folder = tmp_path / "auto"
    arguments = ["auto", str(float_file), "-o", str(folder), "--max-drop", "12", "--json"]
    wrong = CliRunner().invoke(app, [*arguments, "--skip", "stemm"])
    assert (wrong.exit_code, folder.exists()) == (2, False)
    asked = ["--target", "onnxruntime", "--skip", "stem"]
    ledger = Ledger(tmp_path / "ledger.json")
    done = CliRunner().invoke(app, [*arguments, *asked, "--ledger", str(tmp_path / "ledger.json")])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    chosen = load_checkpoint(folder / facts["chosen"])
    assert list(ledger.stages) == ["float", chosen.facts.kind, "onnx"]
    for stage, checkpoint in (("float", load_checkpoint(float_file)), (chosen.facts.kind, chosen)):
        scored = score_split(predictor(checkpoint.model), checkpoint.facts, digits).outputs
        np.testing.assert_array_equal(ledger.outputs(stage).predictions, scored.predictions)
    lost = ledger.stages["float"].top1.value - ledger.stages[chosen.facts.kind].top1.value
    assert lost == pytest.approx(-facts["test"]["difference"]["value"])
    assert chosen.facts.quantization == QuantizationSpec(target="onnxruntime", skip=("stem",))
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    for other in ([], ["--target", "onnxruntime"], [*asked, "--toolkit", "modelopt"], [*asked, "--split-seed", "5"]):
        refused = CliRunner().invoke(app, [*arguments, *other])
        assert refused.exit_code == 2, other
        assert "holds a run with other settings" in refused.stderr
    assert "quantization was" in CliRunner().invoke(app, arguments).stderr
    # another budget is another question about the same checkpoints
    assert CliRunner().invoke(app, [*arguments, *asked, "--max-drop", "14"]).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")} == made


def test_what_is_skipped_stays_in_float_in_every_candidate(digits, float_file, tmp_path) -> None:
    spec = QuantizationSpec(skip=("stem",))
    schedule = tiny_schedule(epochs=1, max_steps=2)
    decision = decide(digits, load_checkpoint(float_file), tmp_path, max_drop=0.01, spec=spec, schedule=schedule)
    skipped = {
        trial.step: load_checkpoint(tmp_path / trial.checkpoint).facts.quantization.skip for trial in decision.trials
    }
    assert skipped.pop("partial quantization") in (("stem", "depthwise"), ("stem", "head"))
    assert set(skipped.values()) == {("stem",)}


def test_auto_refuses_what_makes_no_sense(digits, ptq_file, float_file, tmp_path) -> None:
    with pytest.raises(UsageError, match="takes a float checkpoint"):
        decide(digits, load_checkpoint(ptq_file), tmp_path, max_drop=1)
    with pytest.raises(UsageError, match="max-drop 0"):
        decide(digits, load_checkpoint(float_file), tmp_path, max_drop=0)


@pytest.fixture(scope="module")
def same_names_file(digits, tmp_path_factory) -> Path:
    """A calibrated network with a layer ``residual`` and an addition whose quantizer has that label."""
    folder = tmp_path_factory.mktemp("same")
    start = folder / "float.safetensors"
    schedule = tiny_schedule(epochs=1, max_steps=20)
    fit(digits, start, schedule=schedule, model="tiny_model:same_names", image_size=IMAGE_SIZE)
    calibrate(digits, load_checkpoint(start), folder / "ptq.safetensors", method="max")
    return folder / "ptq.safetensors"


def test_a_layer_and_an_activation_of_one_name_are_both_measured(digits, same_names_file, tmp_path) -> None:
    checkpoint = load_checkpoint(same_names_file)
    assert "residual" in {quantizer.label for _, quantizer in quantizers(checkpoint.model)}
    checkpoint.model.get_submodule("residual").weight_quantizer.set_amax(torch.full((8, 1, 1, 1), 100.0))
    found = measure_sensitivity(checkpoint, digits, tmp_path / "s.json", images=60)
    keys = [(row.kind, row.name) for row in found.layers]
    assert len(keys) == len(set(keys)) == len({id(quantizer) for _, quantizer in quantizers(checkpoint.model)}) - 3
    rows = dict(zip(keys, found.layers, strict=True))
    # only the layer's own quantizer is broken
    layer, activation = rows["layer", "residual"], rows["activation", "residual"]
    assert layer.only_quantized.kl > 10 * activation.only_quantized.kl > 0
    assert layer.title != activation.title


def test_what_a_killed_run_measured_of_one_name_is_not_taken_for_both(digits, same_names_file, tmp_path) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == total:
            raise Killed

    output, kept = tmp_path / "s.json", tmp_path / "s.layers.jsonl"
    with pytest.raises(Killed):
        measure_sensitivity(load_checkpoint(same_names_file), digits, output, images=60, progress=kill)
    header, *lines = kept.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    activation = {"name": "residual", "kind": "activation"}
    # a run of the version that mixed them up measured the layer only, and kept its row
    rows = [row for row in rows if not activation.items() <= row.items()]
    assert len(rows) == len(lines) - 1
    for row in rows:
        if row["name"] == "residual":
            row["only_quantized"]["kl"] = 1234.5
    kept.write_text("\n".join([header, *map(json.dumps, rows), ""]))
    found = measure_sensitivity(load_checkpoint(same_names_file), digits, output, images=60)
    kinds = {row.kind: row.only_quantized.kl for row in found.layers if row.name == "residual"}
    assert kinds["layer"] == 1234.5
    assert 0 < kinds["activation"] < 100


@pytest.mark.parametrize("left", ["unfinished", "of another version"])
def test_auto_goes_on_with_an_unfinished_training_or_begins_anew(digits, float_file, tmp_path, caplog, left) -> None:
    class Interrupt:
        """Presses Ctrl-C in the second epoch of the first training."""

        def __init__(self) -> None:
            self.epochs: list[int] = []

        def step(self, *, epoch, **_) -> None:
            if epoch == 2 and self.epochs == [1]:
                raise KeyboardInterrupt

        def epoch(self, metrics) -> None:
            self.epochs.append(metrics["epoch"])

    def run(observer):
        schedule = tiny_schedule(epochs=2, max_steps=40, learning_rate=1e-4)
        start = load_checkpoint(float_file)
        return decide(digits, start, tmp_path, max_drop=0.01, schedule=schedule, observer=observer)

    with pytest.raises(TrainingInterrupted) as interrupted:
        run(Interrupt())
    assert "run the same command to go on" in str(interrupted.value)
    assert "--resume" not in str(interrupted.value)  # auto has no such option
    unfinished = resume_path_for(tmp_path / "qat.safetensors")
    made = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".json")}
    assert tmp_path / "sensitivity.json" in made
    if left == "of another version":
        torch.save(torch.load(unfinished, weights_only=True) | {"digest": left}, unfinished)
    again = Interrupt()
    again.epochs.append(0)
    run(again)
    assert again.epochs[1:] == ([2, 1, 2] if left == "unfinished" else [1, 2, 1, 2])  # of QAT, then of distillation
    assert ("trained anew" in caplog.text) == (left != "unfinished")
    assert not unfinished.exists()
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_a_network_that_writes_into_its_input_is_measured_on_the_same_images_every_time(digits, tmp_path) -> None:
    start, ptq = tmp_path / "float.safetensors", tmp_path / "ptq.safetensors"
    schedule = tiny_schedule(epochs=1)
    fit(digits, start, schedule=schedule, model="tiny_model:writes_into_its_input", image_size=IMAGE_SIZE)
    calibrate(digits, load_checkpoint(start), ptq, method="max")
    found = measure_sensitivity(load_checkpoint(ptq), digits, tmp_path / "s.json")
    outputs = []
    for path in (start, ptq):
        checkpoint = load_checkpoint(path)
        outputs.append(score_split(predictor(checkpoint.model), checkpoint.facts, digits, split="dev").outputs)
    assert found.float_top1 == outputs[0].top1
    assert found.quantized.top1 == outputs[1].top1
    assert found.quantized.kl == pytest.approx(outputs[1].divergence_from(outputs[0]).mean, rel=1e-3)
