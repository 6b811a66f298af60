"""One tensor has one Q/DQ pair in the exported graph, however many quantizers or calls stand at it in torch."""

from __future__ import annotations

import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from tests.training.tiny_model import DropoutBetweenReaders
from training.checkpoints.checkpoint import load_checkpoint
from training.onnx_export import check_quantization, export_checkpoint, trace_to_onnx
from training.ptq.calibrate import calibrate
from training.ptq.ranges import fix_ranges, observing_inputs
from training.quantization import QuantizationSpec, exported_pairs, quantize, quantizers
from trtdeploy.errors import QuantizationError
from trtdeploy.onnxgraph.qdq.pairs import merge_equal

SHAPE = (3, 12, 12)


class RunsTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, images):
        features = self.again(torch.relu(self.again(torch.relu(self.stem(images)))))
        return self.head(features.mean((2, 3)))


class DropsInABlock(nn.Module):
    """As torchvision's stochastic depth: a module that in evaluation gives back what it is given."""

    def forward(self, features):
        return functional.dropout(features, 0.1, self.training)


class BetweenReaders(DropoutBetweenReaders):
    def __init__(self, between: nn.Module) -> None:
        super().__init__(4)
        self.dropout = between  # type: ignore[assignment]


class Untraceable(nn.Module):
    """A block whose two layers read one tensor, each through its own quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, features):
        if features.sum() > 1e9:
            return features
        return self.first(features) + self.second(features)


def in_a_block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), Untraceable(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


# Between the readers: the images, the features, the shortcut, the mean's and the head's input, and four weights.
NETWORKS = {
    "identity": (lambda: BetweenReaders(nn.Identity()), 9),
    "dropout": (lambda: BetweenReaders(nn.Dropout(0.1)), 9),
    "dropout2d": (lambda: BetweenReaders(nn.Dropout2d(0.1)), 9),
    "stochastic": (lambda: BetweenReaders(DropsInABlock()), 9),
    "runs_twice": (RunsTwice, 8),
    "untraceable": (in_a_block, 8),
}


def calibrated(make, **spec):
    torch.manual_seed(0)
    noise = torch.randn(4, *SHAPE)
    quantized = quantize(make().eval(), QuantizationSpec(**spec), example=noise[:1])
    with observing_inputs(quantized) as histograms:
        quantized(noise)
    fix_ranges(quantized, histograms)
    return quantized


@pytest.mark.parametrize("toolkit", ["pytorch-quantization", "modelopt"])
@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_has_one_pair(name, target, toolkit):
    if toolkit == "modelopt":
        pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt is not installed")
    make, expected = NETWORKS[name]
    quantized = calibrated(make, target=target, toolkit=toolkit)
    scales = [quantizer.scale_array for quantizer in exported_pairs(quantized, torch.zeros(1, *SHAPE))]
    if target == "tensorrt":
        assert len(scales) == expected
    model = merge_equal(onnx.load_from_string(trace_to_onnx(quantized, torch.zeros(1, *SHAPE), opset=17)))
    check_quantization(model, scales)
    given = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(given) == len(set(given))
    with pytest.raises(QuantizationError, match=f"quantizes {len(scales) - 1} tensors"):
        check_quantization(model, scales[1:])


def test_what_is_off_makes_no_pair():
    quantized = calibrated(RunsTwice)
    for name, quantizer in quantizers(quantized):
        if name.startswith("again"):
            quantizer.disable()
    labels = [quantizer.label for quantizer in exported_pairs(quantized, torch.zeros(1, *SHAPE))]
    assert labels == ["stem.input", "stem.weight", "pooled", "head.input", "head.weight"]


def test_dropout_between_two_readers_is_exported(digits, tmp_path):
    weights, output = tmp_path / "float.safetensors", tmp_path / "ptq.safetensors"
    torch.manual_seed(0)
    save_file(DropoutBetweenReaders(10).state_dict(), weights)
    start = load_checkpoint(weights, model="tiny_model:DropoutBetweenReaders", image_size=16, dataset=digits)
    calibrate(digits, start, output, images=40)
    exported = export_checkpoint(load_checkpoint(output), tmp_path / "m.onnx", digits)
    assert exported.quantize_nodes == exported.dequantize_nodes == 9
