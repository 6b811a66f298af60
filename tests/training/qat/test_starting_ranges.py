from __future__ import annotations

import pytest
import torch

from tests.training.tiny_model import tiny_schedule
from training.checkpoints.checkpoint import load_checkpoint
from training.loop.distributed import Workers
from training.loop.epochs import score
from training.loop.objective import LabelObjective
from training.ptq.starting_ranges import choose_ranges
from training.qat.fine_tuning import networks_compared, qat
from training.quantization import quantizers
from trtdeploy.errors import TrainingError
from trtdeploy.files import sha256_bytes


@pytest.mark.parametrize(("factor", "expected"), [(1.0, "checkpoint"), (200.0, "relative-mse"), (0.02, "relative-mse")])
def test_the_better_ranges_are_taken_and_the_rest_stays(digits, ptq_file, factor, expected):
    start = load_checkpoint(ptq_file)
    with torch.no_grad():
        for _, quantizer in quantizers(start.model):
            if quantizer.of_activation:
                quantizer.amax.mul_(factor)
    before = {key: value.clone() for key, value in start.model.state_dict().items()}
    scores = []

    def dev():
        # a hair's breadth decides between two good ones; here the ranges that were calibrated are to win
        scores.append(score(start.model, digits.split("dev"), start.facts.preprocessing, range(10)))
        return scores[-1].model_copy(update={"top1": 100.0}) if factor == 1.0 and len(scores) == 1 else scores[-1]

    chosen, found = choose_ranges(start.model, digits.split("calibration"), start.facts.preprocessing, dev, Workers())
    assert chosen == expected
    after = start.model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    if expected == "checkpoint":
        assert not changed
    else:
        assert found.top1 > scores[0].top1 + 10
        assert changed
        assert all("input_quantizer" in key or "amax" in key for key in changed)


def test_qat_says_which_ranges_it_began_with(digits, ptq_file, tmp_path):
    def began_with(ranges):
        start = load_checkpoint(ptq_file)
        with torch.no_grad():
            for _, quantizer in quantizers(start.model):
                if quantizer.of_activation:
                    quantizer.amax.mul_(200)
        schedule = tiny_schedule(epochs=1, learning_rate=1e-4, regularise=False)
        saved = qat(digits, start, tmp_path / f"{ranges}.safetensors", schedule=schedule, ranges=ranges)
        return saved.facts.training.starting_ranges

    assert began_with("learned") == "relative-mse"
    assert began_with("frozen") is None


@pytest.mark.parametrize("ranges", ["learned", "frozen"])
def test_all_networks_that_dev_may_choose_are_counted(digits, ptq_file, tmp_path, monkeypatch, ranges):
    """Whatever dev says, what QAT writes is one of so many networks."""
    schedule = tiny_schedule(epochs=2, max_steps=None, learning_rate=1e-4, regularise=False)
    might_be_written = set()

    def train_where_dev_likes(start_looks_best: int) -> None:
        looks = 0

        def scored(objective, model, split, preprocessing):
            nonlocal looks
            looks += 1
            state = model.state_dict()
            might_be_written.add(sha256_bytes(b"".join(state[key].numpy().tobytes() for key in sorted(state))))
            found = score(model, split, preprocessing, range(10))
            return found.model_copy(update={"top1": 99.0 if looks == start_looks_best else 50.0})

        monkeypatch.setattr(LabelObjective, "score", scored)
        qat(digits, load_checkpoint(ptq_file), tmp_path / "qat.safetensors", schedule=schedule, ranges=ranges)

    train_where_dev_likes(1)
    train_where_dev_likes(2)
    assert len(might_be_written) == networks_compared(schedule, ranges=ranges)


def test_no_process_waits_while_the_main_one_scores(digits, ptq_file, monkeypatch):
    start = load_checkpoint(ptq_file)
    scored = []

    def dev():
        scored.append(score(start.model, digits.split("dev"), start.facts.preprocessing, range(10)))
        return scored[-1]

    def main_gives(box, src):
        assert len(scored) == 2  # before it asks for what the main process found
        found, ranges = box[0]
        box[0] = found, {name: amax * 2 for name, amax in ranges.items()}

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", main_gives)
    before = {name: quantizer.amax.clone() for name, quantizer in quantizers(start.model)}
    choose_ranges(start.model, digits.split("calibration"), start.facts.preprocessing, dev, Workers(1, 2))
    after = {name: quantizer.amax for name, quantizer in quantizers(start.model)}
    assert all(torch.equal(after[name], amax * 2) for name, amax in before.items() if "weight" in name)

    def refuse():
        raise TrainingError("not finite")

    with pytest.raises(TrainingError, match="not finite"):
        choose_ranges(start.model, digits.split("calibration"), start.facts.preprocessing, refuse, Workers(1, 2))
