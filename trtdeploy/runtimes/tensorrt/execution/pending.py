"""An inference on its way: its results lie in pinned memory when the event of its slot has come."""

from __future__ import annotations

from collections.abc import Mapping

from trtdeploy.cuda.memory import StagingSlot
from trtdeploy.runtimes.base import Pending
from trtdeploy.tensors import Array


class TensorRTPending(Pending):
    """Waits for one inference.

    Args:
        slot: Pinned memory that the outputs are copied to; it is given back by ``wait``.
        results: Arrays of the outputs' shapes and dtypes, to be filled.
        offsets: Where each output begins in the slot; outputs in host memory have none.
        host_values: Outputs that TensorRT writes to host memory itself.
        inputs: Kept until the end: the device may read an input where its owner has it.
    """

    def __init__(
        self,
        slot: StagingSlot,
        results: dict[str, Array],
        offsets: Mapping[str, int],
        host_values: Mapping[str, Array],
        inputs: Mapping[str, Array],
    ) -> None:
        self._slot = slot
        self._results = results
        self._offsets = offsets
        self._host_values = host_values
        self._inputs: Mapping[str, Array] | None = inputs

    def wait(self) -> dict[str, Array]:
        try:
            self._slot.synchronize()  # which may be done in any thread, whatever its device
            for name, array in self._results.items():
                if not array.nbytes:
                    continue
                if name in self._offsets:
                    array[...] = self._slot.view(array.dtype, array.shape, offset=self._offsets[name])
                else:
                    array[...] = self._host_values[name]
        finally:
            self._inputs = None
            self._slot.release()
        return self._results
