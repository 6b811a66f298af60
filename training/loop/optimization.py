"""What one training step needs beside the batch: modes, optimizer, device, precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from training.loop.schedule import Schedule
from training.quantization.range_learning import LearnedRanges
from trtdeploy.errors import RuntimeUnavailableError, TrainingError

DeviceChoice = Literal["auto", "cpu", "cuda"]
_CPU = torch.device("cpu")
_PIXELS_WORTH_THREADS = 1 << 17
"""Pixels per batch below which one thread does the work: 128 images of 32x32."""


@dataclass(frozen=True)
class Execution:
    """Where training runs and in which precision; ``amp`` is bfloat16 autocast, with fake quantization in float32."""

    device: torch.device = _CPU
    amp: bool = False

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context for the forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.amp else nullcontext()


def execution_for(choice: DeviceChoice = "auto", *, amp: bool = False) -> Execution:
    """Choose the device; ``auto`` takes a GPU if there is one.

    Raises:
        RuntimeUnavailableError: There is no such device, or it cannot compute in bfloat16.
    """
    has_gpu = torch.cuda.is_available()
    if choice == "cuda" and not has_gpu:
        raise RuntimeUnavailableError("--device cuda: torch sees no GPU here.", hint="Leave --device out, or say cpu.")
    device = torch.device("cuda" if choice != "cpu" and has_gpu else "cpu")
    if amp and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise RuntimeUnavailableError("--amp needs a GPU that computes in bfloat16 (compute capability 8.0 or later).")
    if amp and device.type == "cpu" and choice != "cpu":
        raise RuntimeUnavailableError(
            "--amp: there is no GPU here.", hint="To have bfloat16 on the processor all the same, add --device cpu."
        )
    if amp and device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        raise RuntimeUnavailableError(
            "--amp: this processor has no bfloat16 instructions, so it would only be slower.", hint="Leave out --amp."
        )
    return Execution(device=device, amp=amp)


def set_modes(model: nn.Module, schedule: Schedule, *, freeze_batch_norm: bool) -> None:
    """Put a network into training mode, but for what the schedule keeps still."""
    model.train()
    for module in model.modules():
        is_batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        # A leaf with a probability of dropping something is a regulariser: nn.Dropout and its kin, and every usual
        # definition of stochastic depth.
        is_regulariser = not any(module.children()) and any(
            isinstance(getattr(module, name, None), float) for name in ("p", "drop_probability", "drop_prob")
        )
        if (is_batch_norm and freeze_batch_norm) or (is_regulariser and not schedule.regularise):
            module.eval()


def make_optimizer(model: nn.Module, schedule: Schedule, ranges: LearnedRanges | None) -> torch.optim.Optimizer:
    """Return AdamW over the weights and, with a learning rate of their own, over learned ranges.

    Raises:
        TrainingError: There is nothing to train.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": schedule.weight_decay, "share": 1.0},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0, "share": 1.0},
        {
            "params": ranges.parameters() if ranges else [],
            "weight_decay": 0.0,
            "share": schedule.range_learning_rate / schedule.learning_rate,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if not trained:
        raise TrainingError("The network has no parameter that can be trained.")
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of the weights, and of the ranges in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["share"]


@contextmanager
def threads_for(pixels_per_batch: int) -> Iterator[None]:
    """Use one thread where operations are so small that several mostly wait for each other.

    EfficientNet-B0 on 32 images of 32x32 gains nothing from a second core and loses a factor of two where that core is
    shared. Then also the same seed gives the same weights on any number of cores.
    """
    threads = torch.get_num_threads()
    if pixels_per_batch < _PIXELS_WORTH_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
