from __future__ import annotations

import pytest
import torch
from tiny_model import tiny_schedule

from training.checkpoint import load_checkpoint
from training.distributed import Workers
from training.loop import score
from training.qat import qat
from training.quantization import quantizers
from training.starting_ranges import choose_ranges


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
