"""Export a checkpoint to ONNX: Q/DQ pairs where there are quantizers, checked against torch before it is written."""

from __future__ import annotations

import io
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.onnx import OnnxExporterError
from torch.utils._pytree import tree_flatten, tree_unflatten

from training.checkpoints.checkpoint import Checkpoint
from training.parity import Names, Parity, compare, own, require_parity
from training.predict import device_of
from training.quantization import (
    Inputs,
    LayerCount,
    QuantizationSpec,
    as_arguments,
    count_layers,
    exported_pairs,
    give_room,
    quantized_layers,
    quantizers,
    quantizers_off,
    refresh_ranges,
    tensors_in,
    unwrapped,
)
from training.quantization import input_names as names_of_inputs
from training.quantization.graph.plain_weights import with_plain_weights
from trtdeploy.data import Dataset
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import ModelError, QuantizationError, UsageError
from trtdeploy.files import atomic_write, sha256_bytes
from trtdeploy.onnxgraph.graph import Graph
from trtdeploy.onnxgraph.qdq.pairs import merge_equal
from trtdeploy.onnxgraph.qdq.ranges_to_qdq import without_qdq
from trtdeploy.onnxgraph.qdq.unsigned_codes import with_unsigned_activations
from trtdeploy.runtimes.onnxruntime.witness import Witness
from trtdeploy.tensors import Array

_log = logging.getLogger(__name__)

INPUT_NAME = "input"
OUTPUT_NAME = "logits"
BATCH_AXIS = "batch"
OPSETS = (17, 20)
"""Lowest and highest that are offered: TensorRT 8.6 and later read 17, torch's tracing exporter writes up to 20."""

_CPU = torch.device("cpu")
_NOTHING: Mapping[str, str] = MappingProxyType({})
_OF_A_CLASSIFIER = Names((INPUT_NAME,), (OUTPUT_NAME,), {INPUT_NAME: {0: BATCH_AXIS}, OUTPUT_NAME: {0: BATCH_AXIS}})


@dataclass(frozen=True)
class Exported:
    """Facts about the file that ``export`` wrote.

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


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Inputs,
    *,
    labels: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    check_on: Iterable[Inputs] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    opset: int = 17,
    metadata: Mapping[str, str] = _NOTHING,
) -> Exported:
    """Write a network as FP32 ONNX, with Q/DQ where it has quantizers, provided that it computes what torch does.

    The first axis of every input and output that is as long as that of the first input is open, and called ``batch``,
    unless ``dynamic_axes`` says otherwise.

    Args:
        model: Of any task; float, or as ``prepare`` returned it and ``calibrate`` gave it ranges. It is exported as it
            computes in evaluation, from the processor, and keeps its mode.
        path: The ``.onnx`` file to write.
        example_inputs: One tensor, a tuple by position, or a dictionary by name.
        labels: Class names, where the first output is class scores ``(N, classes)``; the file carries them.
        preprocessing: How images become the input; the file carries it.
        check_on: Real inputs for the comparison with torch; ``example_inputs`` if None.
        input_names: Of the graph, one for each tensor; as the forward calls them if None.
        output_names: Likewise; the keys of a dictionary, else ``output``, or ``output_0``, ``output_1`` and so on.
        dynamic_axes: All axes that are open, by number, with their names, for each input and output that has some.
        opset: Version of the ONNX operators.
        metadata: What else the file carries.

    Raises:
        UsageError: The opset is not offered, or names or labels do not fit.
        ModelError: torch cannot export the network.
        QuantizationError: Quantizers are missing from the graph or have no range, a scale or zero-point is not what
            TensorRT takes, or the outputs differ. Nothing is written then.
    """
    started = time.perf_counter()
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise UsageError(f"--opset {opset} is not offered; choose from {OPSETS[0]} to {OPSETS[1]}.")
    network = unwrapped(model)
    with _as_exported(network):
        arguments = as_arguments(network, example_inputs, device=_CPU)
        spec = next((layer.spec for layer in quantized_layers(network)), None)
        layers = count_layers(network, *arguments, spec=spec)
        if layers.decides_by_values:
            _log.warning(
                "%s decides by the values of its input what it computes; the exported graph computes for every input "
                "what the example decides",
                type(network).__name__,
            )
        plain = with_plain_weights(network)
        names = _names(plain, arguments, input_names, output_names, dynamic_axes)
        if labels is not None:
            _require_scores(plain, arguments, labels)
        exported = merge_equal(onnx.load_from_string(trace_to_onnx(plain, arguments, opset=opset, names=names)))
        scales = [quantizer.scale_array for quantizer in exported_pairs(plain, *arguments)]
        check_quantization(exported, scales)
        if spec is not None and spec.target == "onnxruntime":
            exported = with_unsigned_activations(exported)
        onnx.helper.set_model_props(exported, _carried(spec, labels, preprocessing) | dict(metadata))
        try:
            onnx.checker.check_model(exported, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ModelError(f"The exported graph is not valid ONNX: {error}") from error
        content = exported.SerializeToString()
        given = [example_inputs] if check_on is None else check_on
        batches = [as_arguments(network, batch, device=_CPU) for batch in given]
        is_classifier = labels is not None
        with quantizers_off(network):
            without = without_qdq(exported).SerializeToString()
            float_parity = compare(without, network, batches, names, classes=is_classifier)
        require_parity(float_parity, quantized=False)
        parity = compare(content, network, batches, names, classes=is_classifier)
        require_parity(parity, quantized=bool(scales))
    atomic_write(path, content)
    return Exported(
        path=Path(path),
        sha256=sha256_bytes(content),
        opset=opset,
        quantize_nodes=_count(exported, "QuantizeLinear"),
        dequantize_nodes=_count(exported, "DequantizeLinear"),
        layers=layers,
        float_parity=float_parity,
        parity=parity,
        seconds=time.perf_counter() - started,
    )


def export_checkpoint(
    checkpoint: Checkpoint, output: Path, dataset: Dataset, *, opset: int = 17, images: int = 64
) -> Exported:
    """Write a checkpoint as ONNX, compared with torch on real images; see ``export``.

    Args:
        checkpoint: Any checkpoint; a float one becomes a model without Q/DQ. Its network is laid out anew.
        output: The ``.onnx`` file to write.
        dataset: Gives the real images for the comparison, from its split ``calibration``.
        opset: Version of the ONNX operators.
        images: How many images to compare on, at most.

    Raises:
        UsageError: The opset is not offered.
        ModelError: torch cannot export the network.
        QuantizationError: See ``export``.
    """
    facts = checkpoint.facts
    network = checkpoint.model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return export(
        network,
        output,
        torch.zeros(1, *facts.preprocessing.sample_shape),
        labels=facts.labels,
        preprocessing=facts.preprocessing,
        check_on=[torch.from_numpy(_real_inputs(checkpoint, dataset, images)).to(memory_format=torch.channels_last)],
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        opset=opset,
        metadata=_metadata(checkpoint),
    )


@contextmanager
def _as_exported(network: nn.Module) -> Iterator[None]:
    """Let a network compute in evaluation, on the processor, with ranges of its weights that stay as they are then."""
    modes = {module: module.training for module in network.modules()}
    device = device_of(network)
    following = [layer for layer in quantized_layers(network) if layer.follows]
    refresh_ranges(network)
    give_room(network)  # refuses one range for a weight that its bias would make too wide; training has moved both
    learning = {quantizer: quantizer.learned_range for _, quantizer in quantizers(network)}
    for quantizer in learning:
        quantizer.learned_range = None
    for layer in following:
        layer.follows = False
    network.eval().to(_CPU)
    try:
        yield
    finally:
        network.to(device)
        for module, training in modes.items():
            module.training = training
        for layer in following:
            layer.follows = True
        for quantizer, learned in learning.items():
            quantizer.learned_range = learned


def _names(
    network: nn.Module,
    arguments: tuple[Any, ...],
    inputs: Sequence[str] | None,
    outputs: Sequence[str] | None,
    axes: Mapping[str, Mapping[int, str]] | None,
) -> Names:
    with torch.no_grad():
        result = network(*own(arguments))
    given, returned = list(tensors_in(arguments)), list(tensors_in(result))
    found_inputs = tuple(inputs or names_of_inputs(network, arguments))
    if outputs is None and isinstance(result, Mapping):
        outputs = [str(key) for key, value in result.items() for _ in tensors_in(value)]
    if outputs is None:
        outputs = ["output"] if len(returned) == 1 else [f"output_{index}" for index in range(len(returned))]
    for kind, names, tensors in (("input", found_inputs, given), ("output", outputs, returned)):
        if len(names) != len(tensors) or len({*found_inputs, *outputs}) != len(found_inputs) + len(outputs):
            raise UsageError(
                f"{type(network).__name__} has {len(tensors)} {kind} tensors, and their names are {', '.join(names)}; "
                "every input and output needs a name of its own.",
                hint="Give input_names and output_names.",
            )
    known = (*found_inputs, *outputs)
    if axes is not None:
        strangers = [name for name in axes if name not in known]
        if strangers:
            raise UsageError(f"dynamic_axes names {', '.join(strangers)}; there are {', '.join(known)}.")
        return Names(found_inputs, tuple(outputs), {name: dict(numbers) for name, numbers in axes.items()})
    batch = next((tensor.shape[0] for tensor in given if tensor.dim()), None)
    named = [*zip(found_inputs, given, strict=True), *zip(outputs, returned, strict=True)]
    open_ones = {name: {0: BATCH_AXIS} for name, tensor in named if tensor.dim() and tensor.shape[0] == batch}
    return Names(found_inputs, tuple(outputs), open_ones)


def _require_scores(network: nn.Module, arguments: tuple[Any, ...], labels: Sequence[str]) -> None:
    with torch.no_grad():
        first = next(tensors_in(network(*own(arguments))))
    if first.dim() != 2 or first.shape[1] != len(labels):
        raise UsageError(
            f"There are {len(labels)} labels, and the first output has the shape {list(first.shape)}; expected class "
            f"scores (N, {len(labels)}).",
            hint="Leave labels out where the network is no classifier.",
        )


class _Flat(nn.Module):
    """A network from tensors to tensors, whatever it takes and returns; what else it takes stays as it is."""

    def __init__(self, network: nn.Module, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.network = network
        self._given, self._structure = tree_flatten(arguments)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(tensors)
        given = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self._given]
        return tuple(tensors_in(self.network(*tree_unflatten(given, self._structure))))


def trace_to_onnx(
    network: nn.Module, example: Tensor | tuple[Any, ...], *, opset: int, names: Names = _OF_A_CLASSIFIER
) -> bytes:
    """Trace a network on an example.

    torch's newer exporter (``dynamo=True``) cannot: the fake quantization reads each range as a Python number, which
    makes the graph depend on data.

    Args:
        network: In evaluation.
        example: Its input, or all by position.
        opset: Version of the ONNX operators.
        names: Of inputs and outputs.

    Raises:
        ModelError: torch cannot export it.
    """
    arguments = example if isinstance(example, tuple) else (example,)
    with torch.no_grad():
        result = network(*own(arguments))
    outputs = result if isinstance(result, tuple) else (result,)
    plain = all(isinstance(each, Tensor) for each in (*arguments, *outputs))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The ranges are constants, so tracing them as such, which this warns of, is what is wanted.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        # That exporter announces its own end, and calls functions that announce theirs.
        for message in (".*legacy TorchScript-based ONNX.*", "The feature will be removed.*"):
            warnings.filterwarnings("ignore", category=DeprecationWarning, message=message)
        try:
            torch.onnx.export(
                network if plain else _Flat(network, own(arguments)).eval(),
                own(arguments) if plain else tuple(tensors_in(own(arguments))),
                buffer,  # type: ignore[arg-type]  # its annotation forgets streams
                dynamo=False,
                opset_version=opset,
                input_names=list(names.inputs),
                output_names=list(names.outputs),
                dynamic_axes=names.axes,
            )
        except (OnnxExporterError, RuntimeError, TypeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(
                f"torch cannot export {type(network).__name__} to ONNX: {reason}",
                hint="Write what it names in operators that ONNX has.",
            ) from error
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


def _carried(
    spec: QuantizationSpec | None, labels: Sequence[str] | None, preprocessing: Preprocessing | None
) -> dict[str, str]:
    """Return what the file says of the network."""
    carried = {"trtdeploy.quantization": "null" if spec is None else spec.model_dump_json()}
    if labels is not None:
        carried["trtdeploy.labels"] = json.dumps(list(labels))
    if preprocessing is not None:
        carried["trtdeploy.preprocessing"] = preprocessing.to_json()
    return carried


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    facts = checkpoint.facts
    calibration = facts.calibration.model_dump(mode="json") if facts.calibration else None
    return {
        "trtdeploy.calibration": json.dumps(calibration),
        "trtdeploy.checkpoint": json.dumps({"kind": facts.kind, "sha256": checkpoint.sha256, "model": facts.model}),
    }


def _same_scale(found: Array, known: Array) -> bool:
    # Up to one rounding: tracing divides amax by 127 in another precision than Python.
    return found.size == known.size and bool(np.allclose(found.ravel(), known, rtol=1e-6, atol=0))


def _count(model: onnx.ModelProto, kind: str) -> int:
    return sum(node.op_type == kind for node in model.graph.node)
