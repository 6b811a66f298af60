"""Which samples run together, which are held out to choose a method with, and how far a pass over them is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trtdeploy.data.samples import Samples, batch_indices
from trtdeploy.errors import UsageError
from trtdeploy.ledger.evaluation import Progress
from trtdeploy.onnxgraph.reading.source import SourceModel
from trtdeploy.tensors import Array

_HELD_OUT = 128

Batch = Mapping[str, Array]


class Parts:
    """The samples in batches of one shape, as a model takes them.

    Args:
        source: The model; inputs whose first size is not open set the size of every batch.
        samples: The samples.
        chosen: Those to use.
        size: Samples per batch, where the model leaves that open.
        fixed: Inputs that are no batch.

    Raises:
        UsageError: The model takes batches of one size only, and the samples of one shape are no multiple of that.
    """

    def __init__(
        self, source: SourceModel, samples: Samples, chosen: list[int], size: int, *, fixed: Collection[str] = ()
    ) -> None:
        self._samples = samples
        self._fixed = fixed
        exact = _exact_size(source, fixed)
        self.chosen = chosen
        self.batches = batch_indices(samples, chosen, exact or size)
        self._is_exact = exact is not None
        self._size = exact or size
        short = next((batch for batch in self.batches if exact and len(batch) < exact), None)
        if exact is not None and short is not None:
            alike = sum(samples.shape(index) == samples.shape(short[0]) for index in chosen)
            which = "samples" if alike == len(chosen) else f"samples of the shape of {samples.ids[short[0]]}"
            raise UsageError(
                f"{source.path} takes batches of exactly {exact}, and {alike} {which} are not a multiple of that.",
                hint=f"Give --images {max(exact, alike // exact * exact)}."
                if alike == len(chosen)
                else f"Give a multiple of {exact} samples of each shape.",
            )

    def held_out(self) -> tuple[list[list[int]], list[list[int]]]:
        """Return the batches without a quarter of the samples, at most ``_HELD_OUT``, evenly spread; and those of it.

        Raises:
            UsageError: There are too few samples for that.
        """
        if self._is_exact:
            units = self.batches
            held = min(max(1, _HELD_OUT // len(units[0])), len(units) // 4)
        else:
            units = [[index] for index in self.chosen]
            held = min(_HELD_OUT, len(units) // 4)
            held = held // self._size * self._size or held  # whole batches, where there are so many
        if not held:
            raise UsageError(
                f"--method auto holds out a quarter of the samples to choose with, and {len(self.chosen)} are too few "
                "for that.",
                hint=f"Give at least {4 * len(units[0])} samples, or a --method.",
            )
        picked = set(np.linspace(0, len(units) - 1, held).round().astype(int).tolist())
        kept, out = (
            batch_indices(
                self._samples,
                [i for place, unit in enumerate(units) if (place in picked) == part for i in unit],
                self._size,
            )
            for part in (False, True)
        )
        return kept, out

    def read(self, batches: Sequence[list[int]], progress: Progress | None = None) -> Read:
        """Return the arrays of some batches, which are made as they are used."""
        return Read(self._samples, batches, self._fixed, progress)


class Read:
    """Arrays of batches, that report how many of their samples are done, and know whether any had other floats than 0.

    Attributes:
        has_values: A float of a sample was not 0, or the samples have no floats.
    """

    def __init__(
        self, samples: Samples, batches: Sequence[list[int]], fixed: Collection[str], progress: Progress | None
    ) -> None:
        self._samples = samples
        self._batches = batches
        self._fixed = fixed
        self._progress = progress
        self.has_values = False

    def __iter__(self) -> Iterator[Batch]:
        done, total = 0, sum(map(len, self._batches))
        for indices in self._batches:
            batch = self._samples.batch(indices)
            given: list[Array] = [array for name, array in batch.items() if name not in self._fixed]
            floats: list[Any] = [array for array in given if np.issubdtype(array.dtype, np.floating)]
            self.has_values |= not floats or any(array.any() for array in floats)
            yield batch
            done += len(indices)
            if self._progress:
                self._progress(done, total)


def _exact_size(source: SourceModel, fixed: Collection[str]) -> int | None:
    sizes = {
        spec.name: spec.shape[0]
        for spec in source.inputs
        if spec.shape and spec.shape[0] > 0 and spec.name not in fixed
    }
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UsageError(
            f"The inputs of {source.path} have different batch sizes: {listed}.",
            hint="An input that is no batch is given apart: --fixed NAME=FILE|VALUE",
        )
    return next(iter(sizes.values()), None)
