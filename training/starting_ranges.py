"""The ranges that QAT with learned ranges starts from: those of the checkpoint, or better ones.

A range is learned by small steps. One that calibration made a hundred times too large, because one image had such a
value, costs most of a short run to come back, and the weights follow the noise meanwhile. So the ranges are taken anew
by the relative squared error, and what scores better on the dev split is the start. Source of starting learned ranges
from the least squared error: Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and
better initialization", https://arxiv.org/abs/2004.09576, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from training.checkpoint import DevMetrics
from training.distributed import Workers
from training.quantization import quantizers
from training.ranges import fix_ranges, observing_inputs
from trtdeploy.calibration import AbsHistogram
from trtdeploy.datasets import Split
from trtdeploy.preprocessing import Preprocessing

StartingRanges = Literal["checkpoint", "relative-mse"]
_METHOD: Literal["relative-mse"] = "relative-mse"
_BATCH = 64


def choose_ranges(
    model: nn.Module,
    images: Split,
    preprocessing: Preprocessing,
    score: Callable[[], DevMetrics],
    workers: Workers,
) -> tuple[StartingRanges, DevMetrics]:
    """Give a quantized network the better of the ranges that it has and those taken anew.

    Args:
        model: A quantized network with ranges.
        images: What to take ranges from; never the dev or test split.
        preprocessing: How they become model input.
        score: Scores the network as it is on the dev split.
        workers: The processes that train together. The main one chooses for all: on another kind of processor scores
            may differ in the last digit.

    Returns:
        Whose ranges the network has now, and its score with them. On equal scores its own stay.

    Raises:
        QuantizationError: A value is not finite.
        TrainingError: An answer on the dev split is not finite.
    """
    found = _choose(model, images, preprocessing, score) if workers.is_main else None
    if workers.count > 1:
        amaxes = {name: quantizer.amax for name, quantizer in quantizers(model)}
        found, amaxes = workers.from_main((found, {k: None if v is None else v.cpu() for k, v in amaxes.items()}))
        for name, quantizer in quantizers(model):
            if (amax := amaxes[name]) is not None:
                quantizer.set_amax(amax)
        model.to(_device(model))
    assert found is not None  # the main process always finds something
    return found


def _choose(
    model: nn.Module, images: Split, preprocessing: Preprocessing, score: Callable[[], DevMetrics]
) -> tuple[StartingRanges, DevMetrics]:
    own = score()
    device = _device(model)
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    model.eval()
    with observing_inputs(model, AbsHistogram) as collected:
        for batch in images.batches(preprocessing, _BATCH):
            model(torch.from_numpy(batch.inputs).to(device, memory_format=torch.channels_last))
    fix_ranges(model, collected, method=_METHOD)
    model.to(device)
    anew = score()
    if (anew.top1, -anew.loss) > (own.top1, -own.loss):
        return _METHOD, anew
    model.load_state_dict(kept)
    return "checkpoint", own


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
