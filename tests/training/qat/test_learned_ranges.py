from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from tests.training.loop.test_fit_and_qat import InterruptAfter
from tests.training.tiny_model import tiny_schedule
from training.checkpoints.checkpoint import load_checkpoint
from training.loop.epochs import TrainingInterrupted, score
from training.loop.optimization import Execution, execution_for
from training.onnx_export import export_checkpoint
from training.qat.fine_tuning import qat
from training.quantization import Quantizer, make_quantizer, quantized_layers, quantizers
from training.quantization.learned_range import LearnedRange
from trtdeploy.errors import RuntimeUnavailableError


def quantizer_with(amax: float) -> tuple[Quantizer, LearnedRange]:
    quantizer = make_quantizer("x", axis=None)
    quantizer.set_amax(torch.tensor(amax))
    quantizer.learned_range = LearnedRange(quantizer.amax, quantizer.label)
    return quantizer, quantizer.learned_range


def lsq_gradient(x: torch.Tensor, amax: float, upstream: torch.Tensor) -> float:
    """Equation 3 of LSQ, written out, times the range for the gradient of its logarithm."""
    codes = x / (amax / 127)
    rounded = codes.round()
    by_scale = torch.where((rounded < -128) | (rounded > 127), rounded.clamp(-128, 127), rounded - codes)
    return float((upstream * by_scale).sum() * amax / 127)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_is_that_of_lsq(layout):
    x = torch.randn(4, 3, 9, 7, generator=torch.Generator().manual_seed(0)).to(memory_format=layout).requires_grad_()
    upstream = torch.randn(4, 3, 9, 7, generator=torch.Generator().manual_seed(1))
    quantizer, learned = quantizer_with(1.3)  # some values are clipped
    outputs = quantizer(x)
    with torch.no_grad():
        assert torch.equal(outputs, quantizer(x))
    (outputs * upstream).sum().backward()
    assert float(learned.log_amax.grad) == pytest.approx(lsq_gradient(x.detach(), 1.3, upstream), rel=1e-3)
    inside = (x.detach() / (1.3 / 127)).round().clamp(-128, 127) == (x.detach() / (1.3 / 127)).round()
    assert torch.equal(x.grad, upstream * inside)


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_a_range_far_off_moves_to_where_it_belongs(factor):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    quantizer, learned = quantizer_with(4.0 * factor)
    optimizer = torch.optim.Adam([learned.log_amax], lr=0.1)
    for _ in range(80):
        optimizer.zero_grad()
        (quantizer(x) - x).square().sum().backward()
        optimizer.step()
        learned.write_back()
    assert 2.0 < float(quantizer.amax) < 6.0


def test_a_range_stays_positive_and_finite_whatever_the_optimizer_does():
    quantizer, learned = quantizer_with(1.0)
    for value in (-1e6, 1e6):
        with torch.no_grad():
            learned.log_amax.fill_(value)
        learned.write_back()
        assert 0 < float(quantizer.amax) < math.inf


def test_qat_brings_back_a_network_whose_ranges_outliers_decided(digits, ptq_file, tmp_path):
    def broken():
        start = load_checkpoint(ptq_file)
        with torch.no_grad():
            for _, quantizer in quantizers(start.model):
                if quantizer.of_activation:
                    quantizer.amax.mul_(120)
        return start

    start = broken()
    before = score(start.model, digits.split("dev"), start.facts.preprocessing, range(10)).top1
    healthy = start.facts.dev.top1
    schedule = tiny_schedule(epochs=3, learning_rate=1e-4, range_learning_rate=0.1, regularise=False)
    runs = {
        ranges: qat(digits, broken(), tmp_path / f"{ranges}.safetensors", schedule=schedule, ranges=ranges)
        for ranges in ("frozen", "learned")
    }
    assert before < healthy - 15
    assert runs["learned"].facts.dev.top1 > healthy - 3
    assert runs["learned"].facts.dev.top1 > runs["frozen"].facts.dev.top1 + 5
    assert runs["learned"].facts.training.ranges == "learned"

    given, written = load_file(ptq_file), load_file(runs["learned"].path)
    assert given.keys() == written.keys()
    assert all(given[key].shape == written[key].shape for key in given)
    learned = load_checkpoint(runs["learned"].path)
    for layer in quantized_layers(learned.model):
        largest = layer.weight.detach().abs().flatten(1).amax(dim=1)
        assert torch.equal(layer.weight_quantizer.amax.flatten(), largest)
    export_checkpoint(learned, tmp_path / "qat.onnx", dataset=digits)


def test_learned_ranges_and_a_teacher_survive_an_interruption(digits, ptq_file, float_file, tmp_path):
    def run(output, **options):
        schedule = tiny_schedule(epochs=3, learning_rate=2e-3, freeze_batch_norm_after=2 / 3, regularise=False)
        teacher = load_checkpoint(float_file)
        return qat(digits, load_checkpoint(ptq_file), output, schedule=schedule, teacher=teacher, **options)

    straight = run(tmp_path / "straight.safetensors")
    output = tmp_path / "resumed.safetensors"
    with pytest.raises(TrainingInterrupted, match="--resume"):
        run(output, observer=InterruptAfter(2))
    assert run(output, resume=True).sha256 == straight.sha256


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this processor has no bfloat16")
def test_mixed_precision_trains_and_keeps_ranges_in_float32(digits, ptq_file, tmp_path):
    execution = execution_for("cpu", amp=True)
    schedule = tiny_schedule(epochs=1, learning_rate=1e-3, regularise=False)
    saved = qat(digits, load_checkpoint(ptq_file), tmp_path / "q.safetensors", schedule=schedule, execution=execution)
    assert saved.facts.training.best_epoch == 1 or saved.facts.dev.top1 > 80
    assert all(value.dtype != torch.bfloat16 for value in load_file(saved.path).values())

    start = load_checkpoint(ptq_file)
    layer = next(iter(quantized_layers(start.model)))
    seen = []
    layer.input_quantizer.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs.dtype))
    with execution.autocast():
        answers = start.model(torch.zeros(2, *start.facts.preprocessing.sample_shape))
    assert answers.dtype == torch.bfloat16
    assert seen == [torch.float32]


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeUnavailableError, match="no GPU"):
        execution_for("cuda")
    with pytest.raises(RuntimeUnavailableError, match=r"(?s)--amp.*--device cpu"):
        execution_for("auto", amp=True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(RuntimeUnavailableError, match="no bfloat16"):
        execution_for("cpu", amp=True)
    assert execution_for() == Execution()
