"""Which Q/DQ pairs a quantized network has once it is exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from training.quantization.quantizer import Quantizer, quantizers

_Pair = tuple[int, int, tuple[int, ...], tuple[int, ...], int | None, bytes]


def exported_pairs(model: nn.Module, *example: Any) -> list[Quantizer]:
    """Return the quantizer of every pair, in the order in which they run; one that is off makes none.

    A pair belongs to a tensor and not to a call. Of a tensor that is quantized twice alike there is one pair: the
    weight of a layer that runs twice, or what a layer reads before a dropout and another one behind it, which in
    evaluation gives what it is given. A quantizer of concatenated tensors, on the other hand, makes one pair for each.

    Args:
        model: With ranges. It is run once, in evaluation.
        example: Its inputs.
    """
    found: dict[_Pair, Quantizer] = {}
    seen: list[Tensor] = []  # kept until the end, so that no two tensors have one address

    def note(quantizer: Quantizer) -> Callable[..., None]:
        scale = quantizer.scale_array.tobytes()

        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            tensor = given[0]
            seen.append(tensor)
            # what an operation in place has changed is another tensor in the graph
            place = (tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.stride())
            found.setdefault((*place, quantizer.axis, scale), quantizer)

        return hook

    hooks = [each.register_forward_pre_hook(note(each)) for _, each in quantizers(model) if each.enabled]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(*example)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return list(found.values())
