from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.training.tiny_model import IMAGE_SIZE, tiny_schedule
from training.checkpoints.checkpoint import load_checkpoint
from training.loop.epochs import TrainingInterrupted, metrics_path_for
from training.loop.fit import fit
from training.loop.resume import resume_path_for
from training.loop.schedule import Schedule
from training.qat.fine_tuning import qat
from trtdeploy.data import open_dataset
from trtdeploy.errors import CheckpointError, TrainingError, UsageError


class InterruptAfter:
    """Presses Ctrl-C in the middle of the epoch after ``epochs`` complete ones."""

    def __init__(self, epochs):
        self.epochs = epochs
        self.steps = []

    def step(self, *, epoch, epochs, step, steps, loss, images_per_s):
        self.steps.append((epoch, step))
        if epoch > self.epochs and step % 5 == 0:
            raise KeyboardInterrupt

    def epoch(self, metrics):
        pass


def run_fit(digits, output, *, schedule=None, **options):
    return fit(
        digits,
        output,
        schedule=schedule or tiny_schedule(epochs=3),
        model="tiny_model:tiny",
        image_size=IMAGE_SIZE,
        **options,
    )


def run_qat(digits, output, ptq_file, **options):
    schedule = tiny_schedule(epochs=3, learning_rate=2e-3, freeze_batch_norm_after=2 / 3, regularise=False)
    return qat(digits, load_checkpoint(ptq_file), output, schedule=schedule, **options)


def test_training_learns_and_says_what_it_did(digits, float_file):
    facts = load_checkpoint(float_file).facts
    assert facts.kind == "float"
    assert facts.model == "tiny_model:tiny"
    assert facts.labels == digits.classes
    assert facts.preprocessing.sample_shape == (3, IMAGE_SIZE, IMAGE_SIZE)
    assert facts.dev.top1 > 80
    assert facts.dev.n == len(digits.split("dev"))
    assert facts.training.images == len(digits.split("train"))
    assert facts.training.steps == facts.training.epochs * (facts.training.images // 32)
    lines = [json.loads(line) for line in metrics_path_for(float_file).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 7))
    best = max(lines, key=lambda line: (line["dev_top1"], -line["dev_loss"]))
    assert (best["epoch"], best["dev_top1"]) == (facts.training.best_epoch, facts.dev.top1)
    assert not resume_path_for(float_file).exists()


def test_the_saved_weights_are_those_of_the_best_epoch(digits, tmp_path):
    # The learning rate of the last epochs is absurd, so they are worse than an earlier one.
    class Worse(Schedule):
        def learning_rate_at(self, step, steps):
            return 1e-2 if step < steps / 2 else 3.0

    saved = run_fit(digits, tmp_path / "a.safetensors", schedule=Worse(**tiny_schedule(epochs=4).model_dump()))
    assert saved.facts.training.best_epoch < 4
    from training.loop.epochs import score

    again = load_checkpoint(saved.path)
    dev = score(again.model, digits.split("dev"), again.facts.preprocessing, range(10))
    assert dev.top1 == saved.facts.dev.top1


def test_the_same_seed_gives_the_same_weights_and_another_does_not(digits, tmp_path):
    schedules = {"a": tiny_schedule(epochs=1), "b": tiny_schedule(epochs=1), "c": tiny_schedule(epochs=1, seed=1)}
    digests = {name: run_fit(digits, tmp_path / f"{name}.safetensors", schedule=s) for name, s in schedules.items()}
    assert digests["a"].sha256 == digests["b"].sha256 != digests["c"].sha256


@pytest.mark.parametrize("kind", ["fit", "qat"])
def test_interrupted_and_resumed_equals_straight(digits, ptq_file, tmp_path, kind):
    def run(output, **options):
        return run_fit(digits, output, **options) if kind == "fit" else run_qat(digits, output, ptq_file, **options)

    straight = run(tmp_path / "straight.safetensors")
    output = tmp_path / "resumed.safetensors"
    with pytest.raises(TrainingInterrupted, match="--resume"):
        run(output, observer=InterruptAfter(2))
    assert not output.exists()
    assert resume_path_for(output).exists()
    torch.manual_seed(99)
    observer = InterruptAfter(100)
    resumed = run(output, resume=True, observer=observer)
    assert {epoch for epoch, _ in observer.steps} == {3}
    assert resumed.sha256 == straight.sha256
    assert not resume_path_for(output).exists()
    history = [json.loads(line) for line in metrics_path_for(output).read_text().splitlines()]
    assert [line["epoch"] for line in history] == [1, 2, 3]


def test_interrupted_before_the_first_epoch_ends_keeps_nothing(digits, tmp_path):
    with pytest.raises(TrainingInterrupted, match="nothing is kept"):
        run_fit(digits, tmp_path / "a.safetensors", observer=InterruptAfter(0))
    assert list(tmp_path.iterdir()) == []


def test_resuming_with_other_settings_is_refused(digits, tmp_path):
    output = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="no unfinished run"):
        run_fit(digits, output, resume=True)
    with pytest.raises(TrainingInterrupted):
        run_fit(digits, output, observer=InterruptAfter(1))
    with pytest.raises(CheckpointError, match="other settings"):
        run_fit(digits, output, schedule=tiny_schedule(epochs=3, learning_rate=2e-2), resume=True)
    with open_dataset("digits", split_seed=5) as other, pytest.raises(CheckpointError, match="other settings"):
        run_fit(other, output, split_seed=5, resume=True)
    resume_path_for(output).write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        run_fit(digits, output, resume=True)


def test_a_loss_that_is_not_finite_stops_training(digits, tmp_path):
    with pytest.raises(TrainingError, match=r"epoch 1, step \d+.*\n.*--learning-rate"):
        run_fit(digits, tmp_path / "a.safetensors", schedule=tiny_schedule(learning_rate=1e30, warm_up=0))
    assert list(tmp_path.iterdir()) == []


def test_answers_that_are_not_finite_after_the_last_step_stop_training(digits, tmp_path):
    schedule = tiny_schedule(epochs=1, max_steps=1, learning_rate=1e38, warm_up=0, final_share=1)
    with pytest.raises(TrainingError, match="answers on dev are not finite"):
        run_fit(digits, tmp_path / "a.safetensors", schedule=schedule)
    assert list(tmp_path.iterdir()) == []


def test_max_steps_ends_training_and_the_schedule_with_it(digits, tmp_path):
    saved = run_fit(digits, tmp_path / "a.safetensors", schedule=tiny_schedule(max_steps=40))
    assert (saved.facts.training.steps, saved.facts.training.epochs) == (40, 2)
    last = json.loads(metrics_path_for(saved.path).read_text().splitlines()[-1])
    assert last["step"] == 40
    assert last["learning_rate"] < 0.02 * 1e-2


def test_a_split_smaller_than_a_batch_is_one_batch_and_that_is_said(colours, tmp_path):
    with open_dataset(colours) as dataset:
        assert len(dataset.split("train")) < 500
        saved = run_fit(dataset, tmp_path / "a.safetensors", schedule=tiny_schedule(epochs=2, batch_size=500))
    assert saved.facts.training.steps == 2
    assert saved.facts.training.batch_size == saved.facts.training.images


def test_the_learning_rate_rises_then_falls_to_its_final_share():
    schedule = tiny_schedule(learning_rate=1.0, warm_up=0.2, final_share=0.01)
    rates = [schedule.learning_rate_at(step, 100) for step in range(100)]
    assert rates[:20] == sorted(rates[:20])
    assert rates[20] == 1.0 == max(rates)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[60] == pytest.approx(0.505)
    assert schedule.learning_rate_at(100, 100) == pytest.approx(0.01)


def test_fit_goes_on_from_a_checkpoint(digits, float_file, tmp_path):
    start = load_checkpoint(float_file)
    before = start.facts.dev.top1
    schedule = tiny_schedule(epochs=1, learning_rate=1e-4)
    saved = fit(digits, tmp_path / "a.safetensors", schedule=schedule, start=start)
    assert saved.facts.parent_sha256 == start.sha256
    assert saved.facts.preprocessing == start.facts.preprocessing
    assert saved.facts.dev.top1 > before - 3


def test_fit_refuses_a_quantized_start_and_qat_a_float_one(digits, float_file, ptq_file, tmp_path):
    with pytest.raises(UsageError, match="fit starts from a float one"):
        fit(digits, tmp_path / "a.safetensors", schedule=tiny_schedule(), start=load_checkpoint(ptq_file))
    with pytest.raises(UsageError, match=r"(?s)starts from a calibrated one.*calibrate"):
        qat(digits, load_checkpoint(float_file), tmp_path / "a.safetensors", schedule=tiny_schedule())


def test_qat_repairs_a_network_that_calibration_broke(digits, ptq_file, tmp_path):
    # A weight range 20 times too small: what an outlier-blind calibration does.
    start = load_checkpoint(ptq_file)
    with torch.no_grad():
        start.model.depthwise._input_quantizer._amax /= 20
    from training.loop.epochs import score

    before = score(start.model, digits.split("dev"), start.facts.preprocessing, range(10)).top1
    saved = qat(
        digits, start, tmp_path / "qat.safetensors", schedule=tiny_schedule(epochs=3, learning_rate=5e-3, warm_up=0)
    )
    assert saved.facts.dev.top1 > before + 5


def test_frozen_ranges_stay_and_qat_never_ends_below_its_start(digits, ptq_file, tmp_path):
    saved = run_qat(digits, tmp_path / "qat.safetensors", ptq_file, ranges="frozen")
    start = load_checkpoint(ptq_file)
    assert saved.facts.kind == "qat"
    assert saved.facts.parent_sha256 == start.sha256
    assert saved.facts.calibration == start.facts.calibration
    assert saved.facts.dev.top1 >= start.facts.dev.top1
    before, after = load_file(ptq_file), load_file(saved.path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before if key.endswith("_amax"))
    assert not torch.equal(before["stem.weight"], after["stem.weight"])


def test_qat_that_only_harms_keeps_what_it_started_from(digits, ptq_file, tmp_path):
    schedule = tiny_schedule(epochs=1, learning_rate=0.5, warm_up=0)
    saved = qat(digits, load_checkpoint(ptq_file), tmp_path / "qat.safetensors", schedule=schedule)
    assert saved.facts.training.best_epoch == 0
    before, after = load_file(ptq_file), load_file(saved.path)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_batch_norm_and_dropout_obey_the_schedule(digits, ptq_file, tmp_path):
    modes = []

    class Watch(InterruptAfter):
        def step(self, **progress):
            modes.append((model.norm.training, model.dropout.training, model.stem.training))

    start = load_checkpoint(ptq_file)
    model = start.model
    schedule = tiny_schedule(epochs=1, max_steps=9, freeze_batch_norm_after=2 / 3, regularise=False)
    qat(digits, start, tmp_path / "qat.safetensors", schedule=schedule, observer=Watch(0))
    assert modes == [(True, False, True)] * 6 + [(False, False, True)] * 3
    assert isinstance(model.norm, nn.BatchNorm2d)


def test_other_splits_than_the_checkpoints_are_pointed_out(ptq_file, tmp_path, caplog):
    with open_dataset("digits", split_seed=8) as other, caplog.at_level(logging.WARNING):
        qat(
            other,
            load_checkpoint(ptq_file),
            tmp_path / "q.safetensors",
            schedule=tiny_schedule(epochs=1, max_steps=1),
            split_seed=8,
        )
    assert "made with other data or splits" in caplog.text
