"""A torch network as the plain function that ``trtdeploy.ledger.evaluation`` scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from trtdeploy.tensors import Array


def predictor(model: nn.Module) -> Callable[[Array], Array]:
    """Return a function from model input ``(N, C, H, W)`` float32 to logits ``(N, classes)`` float32.

    The network is put into evaluation mode, now and at every call, so that it can be used between training epochs.
    Inputs are laid out channels-last: torch's CPU convolutions run several times faster on depthwise layers that way.
    """

    def predict(inputs: Array) -> Array:
        model.eval()
        with torch.inference_mode(), in_float32():
            images = torch.from_numpy(np.ascontiguousarray(inputs, dtype=np.float32))
            logits: Array = model(images.to(device_of(model), memory_format=torch.channels_last)).float().cpu().numpy()
        return logits

    return predict


@contextmanager
def in_float32() -> Iterator[None]:
    """Let convolutions on a GPU compute in float32; cuDNN's default, TF32, keeps 10 bits of each factor."""
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield


def device_of(model: nn.Module) -> torch.device:
    """Return where a network's weights are; the CPU for one that has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
