"""Quantizers of NVIDIA's pytorch-quantization."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from training.quantization.quantizer import Quantizer


class _FromLibrary(logging.Filter):
    """Drops pytorch-quantization's remarks about its own inner steps (it logs every amax it loads as a warning)."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.CRITICAL or "pytorch_quantization" not in record.pathname


@contextmanager
def _root_handlers_kept() -> Iterator[None]:
    """Undo what importing the library does to everybody's logging: it hangs absl's handler on the root logger."""
    root = logging.getLogger()
    before = root.handlers[:]
    try:
        yield
    finally:
        root.handlers[:] = before


with _root_handlers_kept():
    from pytorch_quantization import nn as quant_nn
    from pytorch_quantization.tensor_quant import QuantDescriptor

logging.getLogger("absl").addFilter(_FromLibrary())


class PytorchQuantizationQuantizer(Quantizer, quant_nn.TensorQuantizer):  # type: ignore[misc]
    """A TensorQuantizer that always uses torch's native fake quantization over the full range [-128, 127].

    The library does so only while a global flag is set, and otherwise clamps weights and inputs to [-127, 127]; then
    training and the exported graph would compute different things.
    """

    _fb_fake_quant: Callable[[Tensor, Tensor | None], Tensor]

    def __init__(self, label: str, *, axis: int | None) -> None:
        quant_nn.TensorQuantizer.__init__(self, QuantDescriptor(num_bits=8, axis=axis, calib_method="max"))
        self.label = label
        self.learned_range = None

    def _by_toolkit(self, inputs: Tensor) -> Tensor:
        return self._fb_fake_quant(inputs, self.amax)
