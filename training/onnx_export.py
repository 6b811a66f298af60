"""Export a checkpoint to ONNX: Q/DQ pairs where there are quantizers, checked against torch before it is written."""

from __future__ import annotations

import io
import json
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from training.checkpoint import Checkpoint, layers_of
from training.predict import predictor
from training.quantization import LayerCount, exported_pairs, quantizers_off
from training.quantization.plain_weights import with_plain_weights
from trtdeploy.datasets import Dataset
from trtdeploy.errors import ModelError, QuantizationError, UsageError
from trtdeploy.files import atomic_write, sha256_bytes
from trtdeploy.onnxgraph.qdq import Graph
from trtdeploy.onnxgraph.qdq_pairs import merge_equal
from trtdeploy.onnxgraph.ranges_to_qdq import without_qdq
from trtdeploy.onnxgraph.unsigned_codes import with_unsigned_activations
from trtdeploy.runtimes.onnxruntime.witness import Witness
from trtdeploy.tensors import Array

_log = logging.getLogger(__name__)

INPUT_NAME = "input"
OUTPUT_NAME = "logits"
BATCH_AXIS = "batch"
OPSETS = (17, 20)
"""Lowest and highest that are offered: TensorRT 8.6 and later read 17, torch's tracing exporter writes up to 20."""

# See ``require_parity`` for the reasons.
_FLOAT_TOLERANCE = 1e-3
_QUANTIZED_TOLERANCE = 0.5
_QUANTIZED_DISAGREEMENT = 0.05


@dataclass(frozen=True)
class Parity:
    """How far the ONNX file, in ONNX Runtime, is from the network that it was exported from.

    Attributes:
        images: Real images that both answered.
        relative_error: Root mean square of the difference, divided by the standard deviation of torch's logits.
        disagreements: Images whose top-1 differs.
    """

    images: int
    relative_error: float
    disagreements: int


@dataclass(frozen=True)
class Exported:
    """What ``export`` wrote.

    Attributes:
        layers: Which layers with weights are in INT8, and why the others are not.
        float_parity: Without the Q/DQ pairs, against the network with its quantizers off.
        parity: As written, against the network as it is.
        seconds: Wall time of all of it.
    """

    path: Path
    sha256: str
    opset: int
    quantize_nodes: int
    dequantize_nodes: int
    layers: LayerCount
    float_parity: Parity
    parity: Parity
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            **asdict(self),
            "path": str(self.path),
            "layers": self.layers.model_dump(mode="json"),
            "seconds": round(self.seconds, 2),
        }


def export(checkpoint: Checkpoint, output: Path, dataset: Dataset, *, opset: int = 17, images: int = 64) -> Exported:
    """Write a checkpoint as FP32 ONNX with a dynamic batch axis, provided that it answers as torch does.

    Args:
        checkpoint: Any checkpoint; a float one becomes a model without Q/DQ. Its network is laid out anew.
        output: The ``.onnx`` file to write.
        dataset: Gives the real images for the comparison, from its split ``calibration``.
        opset: Version of the ONNX operators.
        images: How many images to compare on, at most.

    Raises:
        UsageError: The opset is not offered.
        QuantizationError: Quantizers are missing from the graph, a scale or zero-point is not what TensorRT takes, or
            the answers differ. Nothing is written then.
    """
    started = time.perf_counter()
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise UsageError(f"--opset {opset} is not offered; choose from {OPSETS[0]} to {OPSETS[1]}.")
    network = checkpoint.model.eval().to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    layers = layers_of(checkpoint)
    if layers.decides_by_values:
        _log.warning(
            "%s decides by the values of its input what it computes; the exported graph computes what a black image "
            "decides, for every input",
            checkpoint.facts.model,
        )
    shape = checkpoint.facts.preprocessing.sample_shape
    plain = with_plain_weights(network)
    exported = merge_equal(onnx.load_from_string(trace_to_onnx(plain, shape, opset=opset)))
    scales = [quantizer.scale_array for quantizer in exported_pairs(plain, torch.zeros(1, *shape))]
    check_quantization(exported, scales)
    if checkpoint.facts.quantization is not None and checkpoint.facts.quantization.target == "onnxruntime":
        exported = with_unsigned_activations(exported)
    onnx.helper.set_model_props(exported, _metadata(checkpoint))
    try:
        onnx.checker.check_model(exported, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"The exported graph is not valid ONNX: {error}") from error
    content = exported.SerializeToString()
    inputs = _real_inputs(checkpoint, dataset, images)
    with quantizers_off(network):
        float_parity = compare(without_qdq(exported).SerializeToString(), network, inputs)
    require_parity(float_parity, quantized=False)
    parity = compare(content, network, inputs)
    require_parity(parity, quantized=bool(scales))
    atomic_write(output, content)
    return Exported(
        path=output,
        sha256=sha256_bytes(content),
        opset=opset,
        quantize_nodes=_count(exported, "QuantizeLinear"),
        dequantize_nodes=_count(exported, "DequantizeLinear"),
        layers=layers,
        float_parity=float_parity,
        parity=parity,
        seconds=time.perf_counter() - started,
    )


def trace_to_onnx(network: nn.Module, sample_shape: tuple[int, ...], *, opset: int) -> bytes:
    """Trace a network on one black image.

    torch's newer exporter (``dynamo=True``) cannot: the fake quantization reads each range as a Python number, which
    makes the graph depend on data.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The ranges are constants, so tracing them as such, which this warns of, is what is wanted.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        # That exporter announces its own end, and calls functions that announce theirs.
        for message in (".*legacy TorchScript-based ONNX.*", "The feature will be removed.*"):
            warnings.filterwarnings("ignore", category=DeprecationWarning, message=message)
        torch.onnx.export(
            network,
            (torch.zeros(1, *sample_shape),),
            buffer,  # type: ignore[arg-type]  # its annotation forgets streams
            dynamo=False,
            opset_version=opset,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_axes={INPUT_NAME: {0: BATCH_AXIS}, OUTPUT_NAME: {0: BATCH_AXIS}},
        )
    return buffer.getvalue()


def check_quantization(model: onnx.ModelProto, scales: Sequence[NDArray[np.float32]]) -> None:
    """Hold the Q/DQ nodes of a graph against the quantizers and TensorRT's rules for explicit quantization.

    Every pair must have become one QuantizeLinear and one DequantizeLinear with its scale, finite and positive ("Scale
    coefficients must all be positive"); zero-points are INT8 and 0.

    Args:
        model: The exported graph.
        scales: Of each pair that the graph must have, in any order.

    Raises:
        QuantizationError: A rule is broken; the message names the node where there is one.
    """
    graph = Graph(model.graph)
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        nodes = [node for node in model.graph.node if node.op_type == kind]
        if len(nodes) != len(scales):
            raise QuantizationError(
                f"The network quantizes {len(scales)} tensors, but the exported graph has {len(nodes)} {kind} nodes.",
                hint="A pass that folds constants makes such a difference.",
            )
        unmatched = list(scales)
        for node in nodes:
            scale, zero_point = (graph.constant(name) for name in node.input[1:3])
            if scale is None or zero_point is None:
                raise QuantizationError(f"{node.name}: scale or zero-point is not a constant of the graph.")
            if scale.dtype != np.float32 or not np.isfinite(scale).all() or not (scale > 0).all():
                raise QuantizationError(
                    f"{node.name}: its scale is not finite, positive and float32: {scale.ravel()[:4]}."
                )
            if zero_point.dtype != np.int8 or zero_point.any():
                raise QuantizationError(f"{node.name}: its zero-point is not INT8 and 0: {zero_point.ravel()[:4]}.")
            match = next((i for i, known in enumerate(unmatched) if _same_scale(scale, known)), None)
            if match is None:
                raise QuantizationError(f"{node.name}: no quantizer has its scale: {scale.ravel()[:4]}.")
            del unmatched[match]


def compare(content: bytes, network: nn.Module, inputs: Array) -> Parity:
    """Run the same images through the graph as it is written, and torch."""
    expected = predictor(network)(inputs)
    answered = onnx_predictor(content)(inputs)
    difference = float(np.sqrt(np.mean((answered - expected) ** 2)))
    return Parity(
        images=len(inputs),
        relative_error=difference / max(float(expected.std()), 1e-12),
        disagreements=int((answered.argmax(axis=1) != expected.argmax(axis=1)).sum()),
    )


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
            f"checkpoint does: on {parity.images} real images its logits "
            f"differ by {parity.relative_error:.3g} of their spread (at most {tolerance:g}) and {parity.disagreements} "
            f"top-1 answers differ (at most {allowed}). Nothing was written.",
        )


def onnx_predictor(content: bytes) -> Callable[[Array], Array]:
    """Return a function from model input ``(N, C, H, W)`` to logits ``(N, classes)``, exactly as the graph says.

    Args:
        content: The serialized model.

    Raises:
        ModelError: ONNX Runtime does not accept the model.
    """
    run = Witness(content, [OUTPUT_NAME], name="the exported model")
    return lambda inputs: run({INPUT_NAME: inputs})[0]


def _real_inputs(checkpoint: Checkpoint, dataset: Dataset, images: int) -> Array:
    split = dataset.split("calibration")
    chosen = range(min(images, len(split)))
    preprocessing = checkpoint.facts.preprocessing
    return preprocessing.normalise(split.pixels(preprocessing, chosen))


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    facts = checkpoint.facts
    calibration = facts.calibration.model_dump(mode="json") if facts.calibration else None
    return {
        "trtdeploy.preprocessing": facts.preprocessing.to_json(),
        "trtdeploy.labels": json.dumps(list(facts.labels)),
        "trtdeploy.calibration": json.dumps(calibration),
        "trtdeploy.quantization": facts.quantization.model_dump_json() if facts.quantization else "null",
        "trtdeploy.checkpoint": json.dumps({"kind": facts.kind, "sha256": checkpoint.sha256, "model": facts.model}),
    }


def _same_scale(found: Array, known: Array) -> bool:
    # Up to one rounding: tracing divides amax by 127 in another precision than Python.
    return found.size == known.size and bool(np.allclose(found.ravel(), known, rtol=1e-6, atol=0))


def _count(model: onnx.ModelProto, kind: str) -> int:
    return sum(node.op_type == kind for node in model.graph.node)
