"""Batches for training: seeded order, augmented pixels, the next batch decoded in the background."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.loop.augmentation import Augmentation
from training.loop.distributed import Workers
from trtdeploy.data import Split
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import DataError

_ALONE = Workers()
_AHEAD = 2
"""Batches decoded ahead of the one in use: enough to hide a slow one, little enough to hold in memory."""


class TrainingBatches:
    """Shuffled batches of a split, the same ones for the same seed and epoch, whatever happened before.

    Args:
        split: The samples.
        preprocessing: How images become model input.
        batch_size: Samples per batch. A last, smaller batch is left out, because its batch-norm statistics would be
            noisier than all others; a split smaller than one batch makes one batch of all it has.
        seed: Decides order and augmentation, together with the epoch.
        augmentation: What is changed at random.
        label_map: The model's class index for each class index of the dataset.
        workers: The processes that share each batch; this one gets its part.

    Attributes:
        batch_size: Samples per batch, over all processes.

    Raises:
        DataError: There are fewer than 2 samples; batch norm has no statistics over one.
        UsageError: A batch cannot be shared equally.
    """

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        seed: int,
        augmentation: Augmentation,
        label_map: Sequence[int],
        workers: Workers = _ALONE,
    ) -> None:
        if len(split) < 2:
            raise DataError(f"The split {split.name!r} has {len(split)} images; training needs at least 2.")
        self.batch_size = min(batch_size, len(split))
        self._part = workers.part_of(self.batch_size)
        self.steps_per_epoch = len(split) // self.batch_size
        self._split = split
        self._preprocessing = preprocessing
        self._seed = seed
        self._augmentation = augmentation
        self._labels = np.asarray(label_map, dtype=np.int64)[split.labels]

    def epoch(self, number: int, *, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's part of the first ``steps`` batches of an epoch.

        Yields:
            Images ``(N, C, H, W)`` float32 and labels ``(N,)`` int64.

        Raises:
            DataError: An image cannot be read.
        """
        order = np.random.default_rng([self._seed, number]).permutation(len(self._split))
        steps = min(steps, self.steps_per_epoch)
        with ThreadPoolExecutor(1, thread_name_prefix="next-batch") as executor:

            def submit(step: int) -> Future[tuple[NDArray[np.float32], NDArray[np.int64]]]:
                chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
                return executor.submit(self._load, chosen, [self._seed, number, step])

            pending = [submit(step) for step in range(min(_AHEAD, steps))]
            try:
                for step in range(steps):
                    images, labels = pending.pop(0).result()
                    if step + _AHEAD < steps:
                        pending.append(submit(step + _AHEAD))
                    layout = torch.channels_last  # several times faster than row-major on depthwise convolutions
                    yield torch.from_numpy(images).to(memory_format=layout), torch.from_numpy(labels)
            finally:
                for future in pending:
                    future.cancel()

    def _load(self, chosen: NDArray[np.int64], seed: list[int]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        # No torch in here: one parallel operation would give this thread a second team of OpenMP workers, and more
        # workers than cores stop spinning and fall asleep between operations, which halves the speed of training.
        mine = chosen[self._part]
        pixels = self._split.pixels(self._preprocessing, mine)
        pixels = self._augmentation(pixels, np.random.default_rng(seed), part=self._part, of=len(chosen))
        return self._preprocessing.normalise(pixels), self._labels[mine]
