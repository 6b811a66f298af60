from __future__ import annotations

import numpy as np
import pytest
import torch

from training.loop.augmentation import Augmentation
from training.loop.data import TrainingBatches
from trtdeploy.data import open_dataset
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import DataError

PREPROCESSING = Preprocessing.square(16)


def batches_of(split, *, batch_size=10, seed=0, augmentation=None, classes=3):
    return TrainingBatches(
        split,
        PREPROCESSING,
        batch_size=batch_size,
        seed=seed,
        augmentation=augmentation or Augmentation(),
        label_map=range(classes),
    )


@pytest.fixture(scope="module")
def train(colours):
    with open_dataset(colours) as dataset:
        yield dataset.split("train")


def test_every_image_is_seen_at_most_once_and_carries_its_label(train):
    seen = []
    for images, labels in batches_of(train, batch_size=10).epoch(1, steps=100):
        assert images.shape == (10, 3, 16, 16)
        assert images.is_contiguous(memory_format=torch.channels_last)
        # classes are blue, green, red: the brightest channel tells the label
        pixels = (
            images * torch.tensor(PREPROCESSING.std)[:, None, None] + torch.tensor(PREPROCESSING.mean)[:, None, None]
        )
        assert torch.equal(2 - pixels.mean(dim=(2, 3)).argmax(dim=1), labels)
        seen += [image.numpy().tobytes() for image in images]
    assert len(seen) == len(set(seen)) == len(train) // 10 * 10


def test_the_order_follows_from_seed_and_epoch_alone(train):
    def labels(seed, epoch):
        batches = batches_of(train, seed=seed, augmentation=Augmentation(shift_px=2, flip=True))
        return [(images.sum().item(), labels.tolist()) for images, labels in batches.epoch(epoch, steps=3)]

    assert labels(0, 4) == labels(0, 4)
    assert labels(0, 4) != labels(0, 5)
    assert labels(0, 4) != labels(1, 4)


def test_labels_are_the_models(train):
    batches = TrainingBatches(
        train, PREPROCESSING, batch_size=10, seed=0, augmentation=Augmentation(), label_map=[7, 8, 9]
    )
    _, labels = next(iter(batches.epoch(1, steps=1)))
    assert set(labels.tolist()) <= {7, 8, 9}


def test_a_split_smaller_than_a_batch_is_one_batch(train):
    batches = batches_of(train, batch_size=1000)
    assert batches.steps_per_epoch == 1
    assert [len(labels) for _, labels in batches.epoch(1, steps=5)] == [len(train)]


def test_one_image_is_too_few(digits):
    class One:
        name = "train"
        labels = np.zeros(1, dtype=np.int64)

        def __len__(self):
            return 1

    with pytest.raises(DataError, match="at least 2"):
        batches_of(One())


def test_an_unreadable_image_is_named(tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        for index in range(8):
            path = tmp_path / "train" / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    with open_dataset(tmp_path) as dataset:
        split = dataset.split("train")
        (tmp_path / split.ids[2]).write_bytes(b"broken")
        with pytest.raises(DataError, match=split.ids[2]):
            list(batches_of(split, classes=2, batch_size=len(split)).epoch(1, steps=1))


def test_a_shift_moves_each_image_by_its_own_amount_and_loses_nothing_at_0():
    pixels = np.zeros((50, 9, 9, 1), dtype=np.uint8)
    pixels[:, 4, 4] = 255
    moved = Augmentation(shift_px=2)(pixels, np.random.default_rng(0))
    assert moved.shape == pixels.shape
    places = {tuple(np.argwhere(image[:, :, 0] == 255)[0]) for image in moved}
    assert all(2 <= row <= 6 and 2 <= column <= 6 for row, column in places)
    assert len(places) > 10
    assert np.array_equal(Augmentation()(pixels, np.random.default_rng(0)), pixels)
    assert (pixels[:, 4, 4] == 255).all()


def test_a_flip_mirrors_about_half_of_the_images():
    pixels = np.zeros((200, 4, 4, 3), dtype=np.uint8)
    pixels[:, :, 0] = 200
    flipped = Augmentation(flip=True)(pixels, np.random.default_rng(0))
    mirrored = (flipped[:, 0, 3, 0] == 200).sum()
    assert 70 < mirrored < 130
    assert ((flipped[:, 0, 0, 0] == 200) ^ (flipped[:, 0, 3, 0] == 200)).all()
