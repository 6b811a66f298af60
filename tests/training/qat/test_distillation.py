from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.training.tiny_model import IMAGE_SIZE, tiny_schedule
from training.checkpoints.checkpoint import load_checkpoint
from training.cli.main import app
from training.loop.epochs import train
from training.loop.fit import fit
from training.ptq.calibrate import calibrate
from training.qat.distillation import Distillation, DistillationSettings, divergence_at
from training.qat.fine_tuning import qat
from trtdeploy.data import open_dataset
from trtdeploy.errors import DataError, UsageError


def test_the_divergence_is_kullback_leibler_of_the_softened_answers():
    own, others = np.random.default_rng(0).normal(size=(2, 5, 4))
    p, q = (np.exp(x / 3) / np.exp(x / 3).sum(axis=1, keepdims=True) for x in (others, own))
    expected = (p * np.log(p / q)).sum(axis=1).mean() * 9
    assert float(divergence_at(torch.tensor(own), torch.tensor(others), 3.0)) == pytest.approx(expected, rel=1e-5)
    assert float(divergence_at(torch.tensor(own), torch.tensor(own), 3.0)) == pytest.approx(0, abs=1e-6)


def test_the_teacher_is_not_changed_and_what_it_did_is_recorded(digits, ptq_file, float_file, tmp_path):
    teacher = load_checkpoint(float_file)
    before = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    settings = DistillationSettings(weight=0.7, temperature=3)
    schedule = tiny_schedule(epochs=1, learning_rate=1e-3, regularise=False)
    output = tmp_path / "q.safetensors"
    start = load_checkpoint(ptq_file)
    saved = qat(digits, start, output, schedule=schedule, teacher=teacher, distillation=settings)
    assert all(torch.equal(before[key], value) for key, value in teacher.model.state_dict().items())
    facts = saved.facts.training
    assert (facts.teacher_sha256, facts.teacher_weight, facts.teacher_temperature) == (teacher.sha256, 0.7, 3)
    assert saved.facts.dev.against == "labels"


def test_the_teacher_sees_the_images_that_the_student_was_given(digits, tmp_path):
    """The student writes into its input, and has so far the teacher's weights."""
    losses = []

    class Watch:
        def step(self, *, loss, **_):
            losses.append(loss)

        def epoch(self, metrics):
            pass

    options = {"model": "tiny_model:writes_into_its_input", "image_size": IMAGE_SIZE}
    fit(digits, tmp_path / "float.safetensors", schedule=tiny_schedule(epochs=1), **options)
    teacher, student = (load_checkpoint(tmp_path / "float.safetensors") for _ in range(2))
    train(
        student.model,
        digits,
        student.facts.preprocessing,
        tiny_schedule(epochs=1, max_steps=1, freeze_batch_norm_after=0, regularise=False),
        objective=Distillation(teacher.model, DistillationSettings(weight=1), range(10)),
        label_map=range(10),
        output=tmp_path / "student.safetensors",
        settings_digest="",
        observer=Watch(),
    )
    assert losses == [pytest.approx(0, abs=1e-6)]


@pytest.fixture(scope="module")
def colour_files(colours, tmp_path_factory):
    """A float checkpoint of the colours, and one calibrated."""
    folder = tmp_path_factory.mktemp("colour-files")
    schedule = tiny_schedule(epochs=6, batch_size=16)
    with open_dataset(colours) as dataset:
        fit(dataset, folder / "float.safetensors", schedule=schedule, model="tiny_model:tiny", image_size=IMAGE_SIZE)
        calibrate(dataset, load_checkpoint(folder / "float.safetensors"), folder / "ptq.safetensors", method="max")
    return folder


@pytest.fixture
def unlabelled(colours, tmp_path):
    """The same images in one folder."""
    folder = tmp_path / "unlabelled" / "train" / "images"
    folder.mkdir(parents=True)
    for index, image in enumerate(sorted((colours / "train").rglob("*.png"))):
        shutil.copy(image, folder / f"{index}.png")
    return tmp_path / "unlabelled"


def test_a_teacher_alone_needs_no_labels(colour_files, unlabelled, tmp_path):
    output = tmp_path / "q.safetensors"
    arguments = ["qat", colour_files / "ptq.safetensors", "--data", unlabelled, "--teacher"]
    arguments += [colour_files / "float.safetensors", "--distill-only", "--epochs", 2, "--batch-size", 16, "--json"]
    result = CliRunner().invoke(app, [*map(str, arguments), "-o", str(output)])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["dev"]["against"] == "teacher"
    assert facts["dev"]["top1"] > 60
    assert facts["training"]["teacher_weight"] == 1
    assert load_checkpoint(output).facts.labels == ("blue", "green", "red")


def test_with_labels_in_the_loss_the_labels_must_be_known(colour_files, unlabelled, tmp_path):
    with open_dataset(unlabelled) as dataset, pytest.raises(DataError, match="does not know"):
        qat(
            dataset,
            load_checkpoint(colour_files / "ptq.safetensors"),
            tmp_path / "q.safetensors",
            schedule=tiny_schedule(epochs=1),
            teacher=load_checkpoint(colour_files / "float.safetensors"),
        )


def test_a_teacher_that_does_not_fit_is_refused(digits, ptq_file, colour_files, tmp_path):
    def run(teacher):
        start = load_checkpoint(ptq_file)
        qat(digits, start, tmp_path / "q.safetensors", schedule=tiny_schedule(), teacher=load_checkpoint(teacher))

    with pytest.raises(UsageError, match="a teacher is a float one"):
        run(ptq_file)
    with pytest.raises(UsageError, match="other classes"):
        run(colour_files / "float.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--distill-only"], "need --teacher"),
        (["--teacher", "f.safetensors", "--distill-only", "--teacher-weight", "0.5"], "--teacher-weight 1"),
        (["--teacher", "f.safetensors", "--teacher-weight", "0"], "above 0 and at most 1"),
        (["--teacher", "f.safetensors", "--temperature", "0"], "not above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(ptq_file, tmp_path, options, message):
    result = CliRunner().invoke(app, ["qat", str(ptq_file), "-o", str(tmp_path / "q.safetensors"), *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
