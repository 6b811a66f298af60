"""What a load sends: requests that are made before it begins, so that making them takes none of its time."""

from __future__ import annotations

import numpy as np

from trtdeploy.data import open_dataset
from trtdeploy.errors import ShapeError, UsageError
from trtdeploy.tensors import Array
from trtdeploy.triton.targets.served_classifier import ServedTarget

_IMAGES = 32
_RANDOM = 8


def make_requests(target: ServedTarget, *, data: str | None, batch_size: int, seed: int) -> list[Array]:
    """Return input for some requests, from a dataset or random.

    Raises:
        ShapeError: The model takes no batch of this size.
        UsageError: The model does not say how images become its input, or random numbers are no input for it.
    """
    if target.max_batch_size is not None and batch_size > target.max_batch_size:
        raise ShapeError(f"{target.name} takes at most {target.max_batch_size} samples per request, not {batch_size}.")
    if data is not None:
        if target.preprocessing is None and not target.takes_files:
            raise UsageError(
                f"{target.name} says nothing about preprocessing, so images cannot become its input.",
                hint="Leave out --data to send random input.",
            )
        with open_dataset(data) as dataset:
            split = dataset.split("test")
            return [
                target.prepare(
                    split, target.preprocessing, [(start + offset) % len(split) for offset in range(batch_size)]
                )
                for start in range(0, min(len(split), _IMAGES * batch_size), batch_size)
            ]
    if not target.input.dtype.startswith("float"):
        raise UsageError(f"{target.name} takes {target.input}: random numbers would be no input.", hint="Give --data.")
    shape = [batch_size, *target.input.shape[1:]]
    if min(shape) < 1:
        raise UsageError(f"{target.name} takes {target.input}: which size is not known.", hint="Give --data.")
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(target.input.dtype) for _ in range(_RANDOM)]
