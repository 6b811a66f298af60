"""Parity of an exported model with its network: both run on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from training.quantization import tensors_in
from trtdeploy.errors import QuantizationError
from trtdeploy.runtimes.onnxruntime.witness import Witness
from trtdeploy.tensors import Array

# See ``require_parity`` for the reasons.
_FLOAT_TOLERANCE = 1e-3
_QUANTIZED_TOLERANCE = 0.5
_QUANTIZED_DISAGREEMENT = 0.05


@dataclass(frozen=True)
class Names:
    """The inputs and outputs of a graph, and their open axes, by number, with their names."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, str]]


@dataclass(frozen=True)
class Parity:
    """How far the ONNX file, in ONNX Runtime, is from the network that it was exported from.

    Attributes:
        images: Real samples that both computed.
        relative_error: Root mean square of the difference, divided by the standard deviation of torch's output; the
            largest of all outputs.
        disagreements: Samples whose top-1 differs; 0 where the output is no class scores.
    """

    images: int
    relative_error: float
    disagreements: int


def compare(
    content: bytes, network: nn.Module, batches: Sequence[tuple[Any, ...]], names: Names, *, classes: bool
) -> Parity:
    """Run the same inputs through the graph as it is written, and torch.

    Args:
        content: The serialized model.
        network: In evaluation, on the processor.
        batches: Inputs by position.
        names: Of the model's inputs and outputs.
        classes: The first output is class scores.
    """
    run = Witness(content, names.outputs, name="the exported model")
    kept = {each.name for each in run.inputs}
    samples = disagreements = 0
    pairs: list[tuple[list[Array], list[Array]]] = [([], []) for _ in names.outputs]
    for batch in batches:
        with torch.inference_mode():
            expected = [tensor.float().numpy() for tensor in tensors_in(network(*own(batch)))]
        named = zip(names.inputs, tensors_in(batch), strict=True)
        answered = run({name: np.ascontiguousarray(tensor.numpy()) for name, tensor in named if name in kept})
        samples += next((len(tensor) for tensor in tensors_in(batch) if tensor.dim()), 1)
        for (ours, theirs), wanted, found in zip(pairs, expected, answered, strict=True):
            ours.append(wanted.ravel())
            theirs.append(found.astype(np.float32).ravel())
        if classes:
            disagreements += int((answered[0].argmax(axis=1) != expected[0].argmax(axis=1)).sum())
    errors = [_relative_error(np.concatenate(ours), np.concatenate(theirs)) for ours, theirs in pairs]
    return Parity(images=samples, relative_error=max(errors), disagreements=disagreements)


def _relative_error(expected: Array, answered: Array) -> float:
    difference = float(np.sqrt(np.mean((answered - expected) ** 2)))
    size = float(np.sqrt(np.mean(expected**2)))
    spread = float(expected.std())
    return difference / max(spread if spread > 1e-6 * size else size, 1e-12)  # of one number there is no spread


def require_parity(parity: Parity, *, quantized: bool) -> None:
    """Refuse a graph that does not compute what torch computes.

    Without its Q/DQ pairs a graph must agree up to rounding: that proves weights, layout and operators. With them it
    cannot. torch multiplies by the reciprocal of the scale where ONNX divides by it, and sums run in another order, so
    a value on the boundary between two codes now and then takes the other one, and the layers behind it carry that
    step on. How far depends on how coarse the codes are: for an EfficientNet-B0 fine-tuned after maximum calibration,
    torch differs from itself by 0.05 of the spread of its logits when only the memory layout changes, and by 0.3 when
    the images are scaled by 1.00001. So here the bounds are wide: half of the spread in root mean square (unrelated
    answers would be at 1.4), and 5% of the answers. That each scale is the quantizer's own is checked exactly,
    elsewhere.

    Raises:
        QuantizationError: The difference is larger.
    """
    tolerance = _QUANTIZED_TOLERANCE if quantized else _FLOAT_TOLERANCE
    allowed = max(1, int(_QUANTIZED_DISAGREEMENT * parity.images)) if quantized else 0
    # Written so that a NaN is refused too.
    if not parity.relative_error <= tolerance or parity.disagreements > allowed:
        raise QuantizationError(
            f"The exported graph{'' if quantized else ', its Q/DQ pairs left out,'} does not compute what the "
            f"network does: on {parity.images} real samples its outputs "
            f"differ by {parity.relative_error:.3g} of their spread (at most {tolerance:g}) and {parity.disagreements} "
            f"top-1 answers differ (at most {allowed}). Nothing was written.",
        )


def own(value: Any) -> Any:
    """Return what a network may write into."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)
