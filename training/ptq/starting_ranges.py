"""The ranges that QAT with learned ranges starts from: those of the checkpoint, or better ones.

A range is learned by small steps. One that calibration made a hundred times too large, because one image had such a
value, costs most of a short run to come back, and the weights follow the noise meanwhile. So the ranges are taken anew
by the relative squared error, and what scores better on the dev split is the start. Source of starting learned ranges
from the least squared error: Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and
better initialization", https://arxiv.org/abs/2004.09576, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from training.checkpoints.checkpoint import DevMetrics
from training.loop.distributed import Workers
from training.predict import device_of
from training.ptq.ranges import fix_ranges, observing_inputs
from training.quantization import quantizers
from trtdeploy.calibration import AbsHistogram
from trtdeploy.data import Split
from trtdeploy.data.preprocessing import Preprocessing

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
    # Every process goes all the way: to wait for one that scores a large dev split would outlast the time limit, and
    # what one refuses all refuse.
    found = _choose(model, images, preprocessing, score)
    if workers.count > 1:
        found, ranges = workers.from_main((found, _ranges_of(model)))
        _give(model, ranges)
    return found


def _choose(
    model: nn.Module, images: Split, preprocessing: Preprocessing, score: Callable[[], DevMetrics]
) -> tuple[StartingRanges, DevMetrics]:
    own, kept = score(), _ranges_of(model)
    device = device_of(model)
    model.eval()
    with observing_inputs(model, AbsHistogram) as collected:
        for batch in images.batches(preprocessing, _BATCH):
            model(torch.from_numpy(batch.inputs).to(device, memory_format=torch.channels_last))
    fix_ranges(model, collected, method=_METHOD)
    anew = score()
    if (anew.top1, -anew.loss) > (own.top1, -own.loss):
        return _METHOD, anew
    _give(model, kept)
    return "checkpoint", own


def _ranges_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: quantizer.amax.cpu() for name, quantizer in quantizers(model) if quantizer.amax is not None}


def _give(model: nn.Module, ranges: Mapping[str, Tensor]) -> None:
    for name, quantizer in quantizers(model):
        if name in ranges:
            quantizer.set_amax(ranges[name])
    model.to(device_of(model))
