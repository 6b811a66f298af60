from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.checkpoints.checkpoint import load_checkpoint
from training.models import create_model
from trtdeploy.data.dataset import Dataset
from trtdeploy.errors import UsageError

SHARED_CHECKPOINT = Path(__file__).parents[4] / "shared/data/efficientnet_b0_cifar10_fp16.safetensors"

# From torchvision.models.efficientnet_b0().state_dict()
TORCHVISION_SHAPES = {
    "features.0.0.weight": (32, 3, 3, 3),
    "features.0.1.running_mean": (32,),
    "features.1.0.block.0.0.weight": (32, 1, 3, 3),
    "features.1.0.block.1.fc1.bias": (8,),
    "features.2.0.block.0.0.weight": (96, 16, 1, 1),
    "features.3.1.block.1.0.weight": (240, 1, 5, 5),
    "features.6.3.block.2.fc2.weight": (1152, 48, 1, 1),
    "features.7.0.block.3.1.num_batches_tracked": (),
    "features.8.0.weight": (1280, 320, 1, 1),
    "classifier.1.weight": (1000, 1280),
    "classifier.1.bias": (1000,),
}


def test_keys_shapes_and_size_are_torchvisions():
    model = create_model("efficientnet_b0", num_classes=1000)
    state = model.state_dict()
    assert len(state) == 360
    assert {key: tuple(state[key].shape) for key in TORCHVISION_SHAPES} == TORCHVISION_SHAPES
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_288_548


@pytest.mark.skipif(not SHARED_CHECKPOINT.exists(), reason=f"{SHARED_CHECKPOINT.name} is not on this machine")
def test_a_published_half_precision_checkpoint_loads_strictly():
    class Store:
        name = "cifar10"

    dataset = Dataset(Store(), [f"class{i}" for i in range(10)], {})
    checkpoint = load_checkpoint(SHARED_CHECKPOINT, dataset=dataset)
    assert checkpoint.facts.kind == "float"
    assert checkpoint.facts.preprocessing.sample_shape == (3, 64, 64)
    assert {parameter.dtype for parameter in checkpoint.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("efficientnet_b9", "efficientnet_b0"),
        ("no_such_module:net", "importing 'no_such_module' failed"),
        ("tiny_model:missing", "has no function 'missing'"),
        ("tiny_model:not_a_network", "expected a torch.nn.Module"),
        ("tiny_model:fails", "out of neurons"),
        (":tiny", "module:factory"),
    ],
)
def test_a_bad_model_name_says_what_was_tried(name, expected):
    with pytest.raises(UsageError, match=expected):
        create_model(name, num_classes=3)
