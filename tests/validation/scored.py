"""A target whose answers depend on nothing but the sample, unless they are spoiled."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.tensors import Array, TensorSpec
from trtdeploy.validation import Target

SIZE = Preprocessing.square(32)
WEIGHTS = np.random.default_rng(0).standard_normal((3 * 32 * 32, 10)).astype(np.float32)


class Scored(Target):
    """A linear classifier whose scores ``spoil`` may change."""

    stage = "served"
    name = "scored"
    version = "1"
    input = TensorSpec(name="input", dtype="float32", shape=(-1, 3, 32, 32))
    max_batch_size = 8
    preprocessing = SIZE
    labels = tuple(str(digit) for digit in range(10))

    def __init__(self, spoil: Callable[[Array], Array] = lambda scores: scores) -> None:
        self._spoil = spoil
        self.source = {}

    def scores(self, batch: Array) -> Array:
        # one by one, so that the linear algebra itself depends on nothing
        return self._spoil(np.stack([sample.reshape(-1) @ WEIGHTS for sample in batch]))
