"""What an ONNX file or a plan is: inputs and outputs, precision, kernels, provenance."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from trtdeploy.data.preprocessing import describe
from trtdeploy.errors import PlanCorruptError, PlanIncompatibleError, RuntimeUnavailableError
from trtdeploy.onnxgraph.qdq.layers import count_quantized, left_in_float
from trtdeploy.onnxgraph.reading.source import load_source
from trtdeploy.plan import manifest_path, read_plan
from trtdeploy.runtimes import get_runtime
from trtdeploy.runtimes.config import LoadOptions


def inspect_file(path: str | Path) -> dict[str, Any]:
    """Return the facts about a plan (a file with a manifest beside it) or an ONNX file.

    Raises:
        PlanCorruptError: The plan does not match its manifest.
        ModelError: It has no manifest and is no ONNX model.
    """
    return _inspect_plan(Path(path)) if manifest_path(path).exists() else _inspect_onnx(Path(path))


def _inspect_onnx(path: Path) -> dict[str, Any]:
    source = load_source(path)
    count = count_quantized(source.proto)
    return {
        "kind": "onnx",
        "file": str(path),
        "sha256": source.sha256,
        "repaired_on_reading": list(source.repairs),
        "opsets": {opset.domain or "ai.onnx": opset.version for opset in source.proto.opset_import},
        "inputs": [spec.model_dump() for spec in source.inputs],
        "outputs": [spec.model_dump() for spec in source.outputs],
        "operators": _operators(source.proto),
        "qdq_pairs": count.pairs,
        "weighted_layers": count.weighted_layers,
        "quantized_layers": count.quantized_layers,
        "layers_asked_for": dict(count.asked),
        # of a float model that is all of them
        "left_in_float": left_in_float(source.proto) if count.pairs else {},
        "preprocessing": describe(source.preprocessing) if source.preprocessing else None,
        "labels": list(source.labels) if source.labels else None,
        "calibration": source.calibration,
    }


def _inspect_plan(path: Path) -> dict[str, Any]:
    content, manifest = read_plan(path)
    precision = manifest.precision
    try:
        runtime = get_runtime(manifest.runtime.name)
        runtime.check(manifest, LoadOptions())
        reasons = {name: layer.left_float for name, layer in precision.layers.items() if layer.left_float}
        precision = runtime.precision_of(content, manifest, LoadOptions()).explained(reasons)
        obstacle = None
    except (PlanIncompatibleError, RuntimeUnavailableError) as error:
        obstacle = error.message
    return {
        "kind": "plan",
        "file": str(path),
        "runs_here": obstacle is None,
        "obstacle": obstacle,
        # an ONNX Runtime plan is an optimized ONNX graph: its operators are the kernels that run
        "kernels": _kernels(path, content) if manifest.runtime.name == "onnxruntime" else None,
        **manifest.model_copy(update={"precision": precision}).model_dump(mode="json"),
    }


def _kernels(path: Path, content: bytes) -> dict[str, int]:
    try:
        return _operators(onnx.load_model_from_string(content))
    except DecodeError as error:
        raise PlanCorruptError(f"The plan {path} is not an optimized ONNX graph: {error}.") from error


def _operators(model: onnx.ModelProto) -> dict[str, int]:
    counts = Counter((f"{node.domain}:" if node.domain else "") + node.op_type for node in model.graph.node)
    return dict(counts.most_common())
