from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from tests.training.tiny_model import tiny
from training.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from training.ptq.calibrate import calibrate
from training.ptq.ranges import fix_ranges, observing_inputs
from training.quantization import (
    SMALLEST_AMAX,
    QuantizationSpec,
    count_layers,
    quantize,
    quantized_layers,
    quantizers,
)
from trtdeploy.calibration import METHODS, AbsHistogram, amax_of
from trtdeploy.errors import CheckpointError, QuantizationError, UsageError


def ranges_after(network, images, **options):
    network = quantize(network.eval(), example=images[:1])
    with observing_inputs(network) as histograms:
        network(images)
    clamped = fix_ranges(network, histograms, **options)
    assert torch.isfinite(network(images)).all()
    return clamped, [(layer.input_quantizer.amax, layer.weight_quantizer.amax) for layer in quantized_layers(network)]


def test_maximum_per_tensor_and_per_output_channel():
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 3))
    images = torch.randn(5, 2, 3, 3)
    hidden = network[0](images).flatten(1)
    clamped, [(conv_input, conv_weight), (linear_input, linear_weight)] = ranges_after(network, images)
    assert clamped == 0
    assert conv_input.shape == ()
    assert conv_input == images.abs().max()
    assert linear_input.item() == pytest.approx(hidden.abs().max().item(), rel=1e-6)
    assert np.array_equal(conv_weight.numpy(), np.abs(network[0].weight.detach().numpy()).max((1, 2, 3), keepdims=True))
    assert np.array_equal(linear_weight.numpy(), np.abs(network[2].weight.detach().numpy()).max(1, keepdims=True))


def test_a_percentile_clips_the_outlier():
    images = torch.rand(100, 1, 10, 10)
    images[0, 0, 0, 0] = 1000.0
    _, [(amax, _)] = ranges_after(nn.Sequential(nn.Conv2d(1, 2, 3)), images, method="percentile", percentile=99.9)
    assert amax.item() == pytest.approx(np.percentile(images.numpy(), 99.9), abs=1000 / 8192)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_range_of_every_tensor_is_the_methods_over_all_batches_together(method, layout):
    torch.manual_seed(0)
    network = quantize(tiny(10).eval(), example=torch.zeros(1, 3, 16, 16))
    batches = [torch.randn(4, 3, 16, 16) * scale for scale in (0.1, 3.0, 1.0)]
    seen = {}
    for name, quantizer in quantizers(network):
        if quantizer.of_activation:
            quantizer.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0].numpy().copy())
            )
    with observing_inputs(network) as histograms:
        for batch in batches:
            network(batch.to(memory_format=layout))
    fix_ranges(network, histograms, method=method, percentile=99.0)
    assert len(seen) == len(histograms) == 4
    ranges = set()
    for name, parts in seen.items():
        together = AbsHistogram()
        together.add(np.concatenate(parts))
        assert together.n == sum(part.size for part in parts)
        assert network.get_submodule(name).amax.item() == np.float32(amax_of(together, method, percentile=99.0))
        ranges.add(network.get_submodule(name).amax.item())
    assert len(ranges) == 4


def test_observing_leaves_the_network_as_it_was():
    network = quantize(tiny(10).eval(), example=torch.zeros(1, 3, 16, 16))
    layers = list(quantized_layers(network))
    layers[0].weight_quantizer.disable()
    images = torch.randn(4, 3, 16, 16)
    with observing_inputs(network) as histograms:
        network(images)
    before = {quantizer: histogram.n for quantizer, histogram in histograms.items()}
    assert not layers[0].weight_quantizer.enabled
    assert all(quantizer.enabled for quantizer in histograms)
    fix_ranges(network, histograms)
    network(images)
    assert {quantizer: histogram.n for quantizer, histogram in histograms.items()} == before


def test_dead_channels_and_constant_tensors_get_a_tiny_range_and_are_counted():
    network = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        network[0].weight.fill_(0)  # all four channels are dead, so the second input is always 0
    clamped, ranges = ranges_after(network, torch.rand(2, 1, 4, 4))
    assert clamped == 5
    for amax in (amax for pair in ranges for amax in pair):
        assert (amax >= SMALLEST_AMAX).all()
        assert (amax / 127 > 0).all()


def test_values_that_are_not_finite_are_named():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1))
    with torch.no_grad():
        network[0].bias.fill_(float("inf"))
    with pytest.raises(QuantizationError, match=r"1\.input"):
        ranges_after(network, torch.rand(2, 1, 4, 4))


class Idle(nn.Module):
    """One layer never runs in evaluation."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(2, 2)
        self.idle = nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


def test_a_layer_that_never_runs_stays_in_float_and_is_named():
    network = quantize(Idle().eval(), example=torch.rand(1, 2))
    with observing_inputs(network) as histograms:
        network(torch.rand(3, 2))
    fix_ranges(network, histograms)
    assert [layer.idle for layer in quantized_layers(network)] == [False, True]
    network(torch.rand(3, 2))
    count = count_layers(network, torch.rand(1, 2))
    assert count.quantized == ("used",)
    assert [(layer.name, layer.reason) for layer in count.in_float] == [
        ("idle", "it never ran on the calibration data")
    ]
    assert not any("idle" in name and "_amax" in name for name in network.state_dict())


def test_a_network_of_which_no_layer_runs_is_refused():
    class Nothing(Idle):
        def forward(self, x):
            return x * 2

    network = quantize(Nothing().eval(), example=torch.rand(1, 2))
    with observing_inputs(network) as histograms:
        network(torch.rand(3, 2))
    with pytest.raises(QuantizationError, match="No layer that could be quantized was computed"):
        fix_ranges(network, histograms)


def test_the_checkpoint_says_how_it_was_calibrated(digits, float_file, tmp_path):
    output = tmp_path / "ptq.safetensors"
    start = load_checkpoint(float_file)
    saved = calibrate(digits, start, output, method="percentile", percentile=99.9, images=40, seed=7)
    facts = load_checkpoint(output).facts
    assert facts == saved.facts
    assert facts.kind == "ptq"
    assert facts.parent_sha256 == start.sha256
    assert facts.dataset.fingerprint == digits.fingerprint
    calibration = facts.calibration
    assert (calibration.method, calibration.percentile, calibration.images, calibration.seed) == (
        "percentile",
        99.9,
        40,
        7,
    )
    split = digits.split("calibration")
    chosen = np.random.default_rng(7).choice(len(split), size=40, replace=False)
    ids = "\n".join(sorted(split.ids[index] for index in chosen))
    assert calibration.image_ids_sha256 == hashlib.sha256(ids.encode()).hexdigest()
    assert facts.dev.top1 > 70


def test_calibration_looks_at_calibration_images_only(digits, float_file, tmp_path, monkeypatch):
    start = load_checkpoint(float_file)
    seen = []
    split_type = type(digits.split("calibration"))
    decode = split_type.pixels

    def spy(self, preprocessing, indices):
        seen.append(self.name)
        return decode(self, preprocessing, indices)

    monkeypatch.setattr(split_type, "pixels", spy)
    calibrate(digits, start, tmp_path / "ptq.safetensors")
    assert set(seen) == {"calibration", "dev"}  # dev for the score that it prints
    assert seen.index("dev") > max(i for i, name in enumerate(seen) if name == "calibration")


def test_the_test_split_is_never_opened(digits, float_file, tmp_path, monkeypatch):
    split_of = type(digits).split

    def guarded(self, name):
        assert name != "test"
        return split_of(self, name)

    monkeypatch.setattr(type(digits), "split", guarded)
    calibrate(digits, load_checkpoint(float_file), tmp_path / "p.safetensors", method="all", bias_correction=True)


def test_the_seed_decides_everything(digits, float_file, tmp_path):
    options = {"method": "mse", "images": 60, "bias_correction": True}

    def run(name, seed):
        saved = calibrate(digits, load_checkpoint(float_file), tmp_path / f"{name}.safetensors", seed=seed, **options)
        return saved.sha256, saved.facts.calibration.image_ids_sha256, saved.facts.calibration.pixels_sha256

    first, again, other = run("first", 3), run("again", 3), run("other", 4)
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))


def test_the_digest_is_of_the_pixels_that_the_network_saw(digits, float_file, tmp_path):
    start = load_checkpoint(float_file)
    saved = calibrate(digits, start, tmp_path / "p.safetensors", method="max")
    split = digits.split("calibration")
    pixels = split.pixels(start.facts.preprocessing, range(len(split)))
    assert saved.facts.calibration.pixels_sha256 == hashlib.sha256(pixels.tobytes()).hexdigest()


def test_all_takes_the_best_on_dev_and_equals_that_method_alone(digits, float_file, tmp_path):
    start = load_checkpoint(float_file)
    with torch.no_grad():
        start.model.get_parameter("norm.bias")[0] += 300  # one channel far away from all others: the method decides
    path = tmp_path / "outlier.safetensors"
    save_checkpoint(path, start.model.state_dict(), start.facts)
    saved = calibrate(digits, load_checkpoint(path), tmp_path / "all.safetensors", method="all", percentile=90.0)
    calibration = saved.facts.calibration
    tried = [(candidate.method, candidate.percentile) for candidate in calibration.candidates]
    percentiles = [("percentile", value) for value in (90.0, 99.9, 99.99, 99.999)]
    assert tried == [("max", None), *percentiles, ("mse", None), ("relative-mse", None), ("entropy", None)]
    assert len({candidate.dev.loss for candidate in calibration.candidates}) > 2
    best = sorted(calibration.candidates, key=lambda candidate: (-candidate.dev.top1, candidate.dev.loss))[0]
    assert (calibration.method, calibration.percentile, saved.facts.dev) == (best.method, best.percentile, best.dev)
    for candidate in calibration.candidates:
        alone = calibrate(
            digits,
            load_checkpoint(path),
            tmp_path / "one.safetensors",
            method=candidate.method,
            percentile=candidate.percentile or 99.0,
        )
        assert alone.facts.dev == candidate.dev
        if candidate == best:
            states = [load_checkpoint(file).model.state_dict() for file in (saved.path, alone.path)]
            assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_bias_correction_is_in_the_facts_and_in_the_file(digits, float_file, tmp_path):
    plain, corrected = (
        calibrate(
            digits, load_checkpoint(float_file), tmp_path / f"{given}.safetensors", images=100, bias_correction=given
        )
        for given in (False, True)
    )
    assert plain.facts.calibration.bias_correction is None
    facts = corrected.facts.calibration.bias_correction
    assert (facts.images, facts.corrected, facts.left_out) == (100, 3, ())
    assert facts.dev_before == plain.facts.dev
    before, after = (load_checkpoint(saved.path).model.state_dict() for saved in (plain, corrected))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"norm.running_mean", "depthwise.bias", "head.bias"}


def test_progress_ends_at_the_total(digits, float_file, tmp_path):
    for correction, total in ((False, 100), (True, 200)):
        seen = []
        calibrate(
            digits,
            load_checkpoint(float_file),
            tmp_path / "p.safetensors",
            images=100,
            bias_correction=correction,
            progress=lambda done, of, seen=seen: seen.append((done, of)),
        )
        assert seen == sorted(seen)
        assert seen[0] == (64, total)
        assert seen[-1] == (total, total)


def test_what_is_skipped_stays_in_float_and_the_checkpoint_says_so(digits, float_file, tmp_path):
    spec = QuantizationSpec(skip=("head", "st*"))
    saved = calibrate(digits, load_checkpoint(float_file), tmp_path / "p.safetensors", spec=spec)
    loaded = load_checkpoint(saved.path)
    assert loaded.facts.quantization == spec
    assert [layer.weight_quantizer.label for layer in quantized_layers(loaded.model)] == ["depthwise.weight"]


def test_a_quantized_checkpoint_that_does_not_say_where_is_refused(ptq_file, tmp_path):
    ptq = load_checkpoint(ptq_file)
    path = tmp_path / "old.safetensors"
    save_checkpoint(path, ptq.model.state_dict(), ptq.facts.model_copy(update={"quantization": None}))
    with pytest.raises(CheckpointError, match="does not say where its quantizers are"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"percentile": 100.0}, "--method max"),
        ({"percentile": 0.0}, "between 0 and 100"),
        ({"images": 10_000}, "has 179 images"),
    ],
)
def test_numbers_that_make_no_sense(digits, float_file, tmp_path, options, expected):
    with pytest.raises(UsageError, match=expected):
        calibrate(digits, load_checkpoint(float_file), tmp_path / "x.safetensors", **options)


def test_a_quantized_checkpoint_is_not_calibrated_again(digits, ptq_file, tmp_path):
    with pytest.raises(UsageError, match="quantized already"):
        calibrate(digits, load_checkpoint(ptq_file), tmp_path / "x.safetensors")


def test_a_network_that_answers_nan_is_not_written(digits, float_file, tmp_path):
    start = load_checkpoint(float_file)
    broken = tiny(10)
    broken.load_state_dict(start.model.state_dict())
    with torch.no_grad():
        broken.head.weight.fill_(3e38)
    path = tmp_path / "huge.safetensors"
    save_checkpoint(path, broken.state_dict(), start.facts)
    with pytest.raises(QuantizationError, match="not finite"):
        calibrate(digits, load_checkpoint(path), tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
