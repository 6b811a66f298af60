"""An ONNX file as it came, checked, with what trtdeploy's metadata says about it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from pydantic_core import from_json

from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import DtypeError, ModelError, UsageError
from trtdeploy.files import keep_inputs, sha256_bytes
from trtdeploy.onnxgraph.reading.normal_form import to_normal_form
from trtdeploy.onnxgraph.tensor_types import without_weights
from trtdeploy.tensors import DYNAMIC, TensorSpec, dtype_from_onnx

logger = logging.getLogger(__name__)

PREPROCESSING_KEY = "trtdeploy.preprocessing"
LABELS_KEY = "trtdeploy.labels"
CALIBRATION_KEY = "trtdeploy.calibration"


@dataclass(frozen=True)
class SourceModel:
    """A checked ONNX model.

    Attributes:
        path: The file.
        sha256: Digest of the file; where weights lie in other files, of the model with these weights.
        proto: The parsed model with all its weights, in normal form (see ``normal_form``); treat it as read-only.
        inputs: What a caller has to give.
        outputs: What comes back.
        preprocessing: From the metadata, if it is there.
        labels: Class names from the metadata, if they are there.
        calibration: How the ranges were found, from the metadata, if it is there.
        repairs: What was repaired on reading, a phrase each; ``proto`` differs from the file by these.
    """

    path: Path
    sha256: str
    proto: onnx.ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocessing: Preprocessing | None
    labels: tuple[str, ...] | None
    calibration: dict[str, Any] | None
    repairs: tuple[str, ...] = ()


def load_source(path: str | Path) -> SourceModel:
    """Read and check an ONNX file.

    Raises:
        ModelError: There is no such file, it is no ONNX model, or the model breaks ONNX's rules.
    """
    source = Path(path)
    try:
        content = source.read_bytes()
    except OSError as error:
        raise ModelError(f"The ONNX file {source} cannot be read: {error}.") from error
    try:
        proto = onnx.load_model_from_string(content)
    except (DecodeError, ValueError) as error:
        raise ModelError(
            f"{source} is not an ONNX model: it cannot be parsed ({error}).",
            hint="It may be truncated, or a checkpoint; export one with: trtdeploy train export",
        ) from error
    # Many byte strings parse as an empty message: protobuf has no magic number.
    if not proto.graph.node or not proto.opset_import:
        raise ModelError(f"{source} is not an ONNX model: it has no graph.")
    refused = _refusal(str(source))
    size = proto.ByteSize()
    try:
        onnx.load_external_data_for_model(proto, str(source.parent))
    except (onnx.checker.ValidationError, ValueError, RuntimeError, OSError) as error:
        raise ModelError(f"The weights of {source} that lie in other files cannot be read: {error}") from error
    digest = sha256_bytes(content if proto.ByteSize() == size else proto.SerializeToString(deterministic=True))
    repairs = normalize(proto, source)
    if refused is not None and repairs:
        refused = _refusal(without_weights(proto))
    if refused is not None:
        raise ModelError(f"{source} breaks ONNX's rules: {_first_lines(refused)}") from refused
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    try:
        return SourceModel(
            path=source,
            sha256=digest,
            proto=proto,
            inputs=tuple(_spec(value) for value in proto.graph.input),
            outputs=tuple(_spec(value) for value in proto.graph.output),
            preprocessing=_preprocessing(metadata),
            labels=_labels(metadata),
            calibration=_json_object(metadata, CALIBRATION_KEY),
            repairs=repairs,
        )
    except (DtypeError, UsageError) as error:
        raise ModelError(f"{source}: {error}") from error


def keep_model(output: str | Path, model: str | Path, what: str = "output") -> None:
    """Refuse an output that would replace a model, or one of the other files that its weights lie in.

    Raises:
        UsageError: It would.
    """
    keep_inputs(output, model, what=what)
    if not Path(output).exists():
        return
    try:
        proto = onnx.load(str(model), load_external_data=False)
    except (OSError, DecodeError, ValueError):
        return  # reading it says why
    named = {entry.value for each in proto.graph.initializer for entry in each.external_data if entry.key == "location"}
    keep_inputs(output, *(Path(model).parent / name for name in sorted(named)), what=what)


def normalize(proto: onnx.ModelProto, source: Path) -> tuple[str, ...]:
    """Bring a model to normal form, in place, and log what was repaired.

    Raises:
        ModelError: An input or output has no shape and nothing tells it, or the nodes cannot be put in order.
    """
    try:
        repairs = to_normal_form(proto)
    except ModelError as error:
        raise ModelError(f"{source}: {error.message}", hint=error.hint) from error
    if repairs:
        logger.warning("%s is repaired on reading: %s", source, "; ".join(repairs))
    for kind, values in (("input", proto.graph.input), ("output", proto.graph.output)):
        for value in values:
            if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
                raise ModelError(
                    f"{source}: the {kind} {value.name!r} has no shape, not even a number of dimensions"
                    + (", and ONNX's shape inference does not find it." if kind == "output" else "."),
                    hint="Export it again with shapes; sizes may stay open.",
                )
    return repairs


def _refusal(model: str | onnx.ModelProto) -> Exception | None:
    """Return what ONNX's checker says against a model."""
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        return error
    return None


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    if not value.type.HasField("tensor_type"):
        raise UsageError(f"{value.name!r} is not a tensor; sequences, maps and optionals are not supported.")
    tensor = value.type.tensor_type
    shape = tuple(max(dim.dim_value, DYNAMIC) if dim.HasField("dim_value") else DYNAMIC for dim in tensor.shape.dim)
    return TensorSpec(name=value.name, dtype=dtype_from_onnx(tensor.elem_type), shape=shape)


def _preprocessing(metadata: dict[str, str]) -> Preprocessing | None:
    text = metadata.get(PREPROCESSING_KEY)
    return Preprocessing.from_json(text) if text is not None else None


def _labels(metadata: dict[str, str]) -> tuple[str, ...] | None:
    labels = _json(metadata, LABELS_KEY)
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UsageError(f"metadata {LABELS_KEY} is not a list of names.")
    return tuple(labels)


def _json_object(metadata: dict[str, str], key: str) -> dict[str, Any] | None:
    value = _json(metadata, key)
    if value is not None and not isinstance(value, dict):
        raise UsageError(f"metadata {key} is not a JSON object.")
    return value


def _json(metadata: dict[str, str], key: str) -> Any:
    """Parse one entry; as strictly as the manifest, which carries it on, is parsed."""
    try:
        return from_json(metadata.get(key, "null"), allow_inf_nan=False)
    except ValueError as error:
        raise UsageError(f"metadata {key} is not JSON: {error}") from error


def _first_lines(error: Exception, count: int = 3) -> str:
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:count])
