"""``--device`` of every command that runs a network.

torch's device ``meta`` stands in for a GPU: a tensor there has a shape and no values, so nothing that lies on the
processor can be computed with it, and what was left behind shows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from tests.training.tiny_model import IMAGE_SIZE
from training.cli.main import app
from training.loop.optimization import Execution
from training.predict import in_float32

COMMANDS = {
    "evaluate": ["evaluate", "PTQ"],
    "evaluate for the ledger": ["evaluate", "PTQ", "--ledger", "OUT/ledger.json"],
    "calibrate": ["calibrate", "FLOAT", "-o", "OUT/ptq.safetensors"],
    "calibrate for the ledger": ["calibrate", "FLOAT", "-o", "OUT/ptq.safetensors", "--ledger", "OUT/ledger.json"],
    "sensitivity": ["sensitivity", "PTQ", "-o", "OUT/s.json"],
    "sensitivity of a float checkpoint": ["sensitivity", "FLOAT", "-o", "OUT/s.json"],
    "qat": ["qat", "PTQ", "-o", "OUT/qat.safetensors"],
    "auto": ["auto", "FLOAT", "-o", "OUT/auto"],
}


class ArrivedError(Exception):
    """A batch of images reached a network that lies where they do."""


@pytest.mark.parametrize("name", COMMANDS)
def test_network_and_images_are_moved(name, float_file, ptq_file, tmp_path, monkeypatch):
    monkeypatch.setattr("training.loop.optimization.execution_for", lambda *_, **__: Execution(torch.device("meta")))

    def watch(network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        images = inputs[0]
        if images.shape[0] > 1 and images.shape[1:] == (3, IMAGE_SIZE, IMAGE_SIZE):
            tensors = [images, *network.parameters(), *network.buffers()]
            assert {tensor.device.type for tensor in tensors} == {"meta"}
            raise ArrivedError

    places = {"FLOAT": str(float_file), "PTQ": str(ptq_file)}
    arguments = [places.get(text, text.replace("OUT", str(tmp_path))) for text in COMMANDS[name]]
    hook = nn.modules.module.register_module_forward_pre_hook(watch)
    try:
        result = CliRunner().invoke(app, arguments)
    finally:
        hook.remove()
    assert isinstance(result.exception, ArrivedError), (result.exception, result.output)


@pytest.mark.parametrize("command", ["calibrate", "evaluate", "sensitivity", "auto"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused_before_any_work(command, float_file, tmp_path):
    output = {"calibrate": "x.safetensors", "sensitivity": "x.json", "auto": "x"}.get(command)
    given = ["--output", str(tmp_path / output)] if output else []
    result = CliRunner().invoke(app, [command, str(float_file), *given, "--device", "cuda"])
    assert result.exit_code == 3
    assert "--device cuda: torch sees no GPU here" in result.output
    assert list(tmp_path.iterdir()) == []


def test_the_ledger_says_on_which_device_a_stage_ran(float_file, tmp_path):
    from trtdeploy.ledger import Ledger

    ledger = tmp_path / "ledger.json"
    arguments = ["evaluate", str(float_file), "--ledger", str(ledger), "--device", "cpu"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert Ledger(ledger).stages["float"].source["device"] == "cpu"


def test_what_is_scored_is_computed_in_float32():
    before = torch.backends.cudnn.allow_tf32
    with in_float32():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.gpu
def test_on_a_gpu_the_ranges_and_scores_are_those_of_the_processor(digits, float_file, tmp_path):
    from training.checkpoints.checkpoint import load_checkpoint
    from training.ptq.calibrate import calibrate
    from training.quantization import quantizers
    from training.sensitivity import measure_sensitivity

    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    ranges, order = {}, {}
    for device in (torch.device("cpu"), torch.device("cuda")):
        output = tmp_path / f"{device.type}.safetensors"
        calibrate(digits, load_checkpoint(float_file), output, device=device, bias_correction=True)
        found = load_checkpoint(output)
        ranges[device.type] = {name: quantizer.amax for name, quantizer in quantizers(found.model)}
        order[device.type] = measure_sensitivity(found, digits, tmp_path / f"{device.type}.json", device=device)
    for name, amax in ranges["cpu"].items():
        assert torch.allclose(amax, ranges["cuda"][name], rtol=1e-2), name
    assert order["cuda"].images == order["cpu"].images
    assert order["cuda"].float_top1.value == pytest.approx(order["cpu"].float_top1.value, abs=1)
    assert found.facts.preprocessing.sample_shape == (3, IMAGE_SIZE, IMAGE_SIZE)
