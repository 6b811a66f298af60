from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.tiny_model import IMAGE_SIZE, tiny_schedule
from training.checkpoints.checkpoint import load_checkpoint
from training.loop.fit import fit
from training.ptq.calibrate import calibrate
from trtdeploy.data import open_dataset

# The networks here are so small that more threads only wait for each other, for long when the machine is busy.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits():
    with open_dataset("digits") as dataset:
        yield dataset


@pytest.fixture(scope="session")
def float_file(digits, tmp_path_factory) -> Path:
    """A trained tiny network."""
    output = tmp_path_factory.mktemp("float") / "float.safetensors"
    fit(digits, output, schedule=tiny_schedule(), model="tiny_model:tiny", image_size=IMAGE_SIZE)
    return output


@pytest.fixture(scope="session")
def ptq_file(digits, float_file, tmp_path_factory) -> Path:
    """The same, calibrated."""
    output = tmp_path_factory.mktemp("ptq") / "ptq.safetensors"
    calibrate(digits, load_checkpoint(float_file), output, method="max")
    return output


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    """A folder of PNGs: noisy red, green and blue images."""
    root = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 4)):
        for channel, name in enumerate(("blue", "green", "red")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 90, (20, 24, 3), dtype=np.uint8)
                pixels[:, :, 2 - channel] += 150
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root
