"""The largest |x| of all values that pass: all that the method ``max`` needs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trtdeploy.errors import QuantizationError
from trtdeploy.tensors import Array


class AbsMaximum:
    """Keeps the largest |x|.

    Attributes:
        n: Number of values.
        largest: The largest |x|; 0 as long as there is none.
    """

    def __init__(self) -> None:
        self.n = 0
        self.largest = 0.0

    def add(self, values: Array) -> None:
        """Look at the values of an array of any shape, taken as float32.

        Raises:
            QuantizationError: A value is not finite; nothing of the array is counted then.
        """
        if not values.size:
            return
        with np.errstate(over="ignore"):
            values = np.asarray(values, np.float32)
        lowest, highest = float(values.min()), float(values.max())
        largest = max(highest, -lowest)
        if not np.isfinite(largest) or np.isnan(lowest):
            broken = int(np.count_nonzero(~np.isfinite(values)))
            raise QuantizationError(
                f"{broken} of {values.size} values are not finite (NaN, infinity, or beyond float32); no range can be "
                "found from them.",
                hint="Evaluate the float model on these inputs first.",
            )
        self._count(values, largest)
        self.n += values.size
        self.largest = max(self.largest, largest)

    def _count(self, values: NDArray[np.float32], largest: float) -> None:
        """Take in what a method other than ``max`` needs of values that are known to be finite."""
