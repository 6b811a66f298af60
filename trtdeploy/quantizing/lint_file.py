"""``trtdeploy lint``: the linter on a file, and repairs that are checked before they are written."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import helper

from trtdeploy.errors import DtypeError, InferenceError, ModelError, TrtDeployError, UsageError
from trtdeploy.files import atomic_write
from trtdeploy.onnxgraph.graph import opset_version
from trtdeploy.onnxgraph.lint import Finding, lint
from trtdeploy.onnxgraph.lint.fix import Repair, fix
from trtdeploy.onnxgraph.reading.source import keep_model, load_source, normalize
from trtdeploy.runtimes.trial_inputs import trial_inputs
from trtdeploy.statistics import sqnr_db
from trtdeploy.tensors import TensorSpec

logger = logging.getLogger(__name__)

_LARGEST_BYTES = 2**31 - 1
"""What one protobuf message, and so one ONNX file, can hold."""
_EXPLAINED = frozenset({"opset", "scale-size", "code-type", "scale-value", "zero-point"})
"""Faults of quantization that make a model break ONNX's own rules."""
_BATCH, _EDGE = 4, 32
"""Stand for the first and for other dimensions that the model leaves open."""


@dataclass(frozen=True)
class Difference:
    """How the answers of a repaired model differ from those before, on random inputs.

    Attributes:
        seed: Of the inputs.
        largest: Largest absolute difference, by output.
        largest_before: Largest absolute value before, by output.
        sqnr_db: The original as signal, the difference as noise, by output; None where one of them is zero.
    """

    seed: int
    largest: dict[str, float]
    largest_before: dict[str, float]
    sqnr_db: dict[str, float | None]


@dataclass(frozen=True)
class Repaired:
    """What became of a file.

    Attributes:
        before: Its findings.
        repairs: What was done.
        left: What breaks the rules still.
        difference: Of the answers; why they could not be compared, as text.
    """

    before: list[Finding]
    repairs: tuple[Repair, ...]
    left: list[Finding]
    difference: Difference | str


def lint_file(path: str | Path, *, ignore: Collection[str] = ()) -> list[Finding]:
    """Return what breaks the rules in an ONNX file; see ``onnxgraph.lint``.

    Raises:
        ModelError: The file is no ONNX model, or breaks ONNX's rules for another reason than its quantization.
        UsageError: There is no such rule.
    """
    return lint(_read(Path(path)), ignore=ignore)


def repair_file(path: str | Path, output: str | Path, *, ignore: Collection[str] = (), seed: int = 0) -> Repaired:
    """Repair what needs no new data, check the result against ONNX's rules, and write it.

    Args:
        path: The ONNX file.
        output: Where to write the repaired one, with all its weights in it.
        ignore: Rules whose findings are not reported.
        seed: Of the random inputs on which the answers are compared.

    Raises:
        ModelError: The file is no ONNX model, or the result breaks ONNX's rules, or ONNX Runtime takes the model but
            not the result. Then nothing is written.
        UsageError: The model is too large for one file, there is no such rule, or the output would replace the input.
    """
    keep_model(output, path)
    model = _read(Path(path))
    before = lint(model, ignore=ignore)
    _require_one_file(model, path)
    fixed = fix(model)
    left = lint(fixed.model, ignore=ignore)
    try:
        content = fixed.model.SerializeToString()
        onnx.checker.check_model(content)
    except (EncodeError, ValueError) as error:
        raise _too_large(path) from error
    except onnx.checker.ValidationError as error:
        what = "; ".join(f"{finding.id} {finding.node}: {finding.reason}" for finding in left[:3])
        raise ModelError(
            f"{path} cannot be repaired: the result breaks ONNX's rules ({str(error).splitlines()[0]}).",
            hint=f"Left: {what}" if what else None,
        ) from error
    difference = _difference(model, fixed.model, seed)
    atomic_write(output, content)
    return Repaired(before, fixed.repairs, left, difference)


def _read(path: Path) -> onnx.ModelProto:
    """Read a model that keeps ONNX's rules, or breaks them by what the linter has rules about."""
    _require_readable_size(path)
    try:
        return load_source(path).proto
    except ModelError as refused:
        try:
            model = onnx.load(str(path))
        except (DecodeError, OSError, ValueError, RuntimeError, onnx.checker.ValidationError):
            raise refused from None
        if (
            not model.graph.node
            or not model.opset_import
            or not all(_is_whole(node, model) for node in model.graph.node)
        ):
            raise
        if not any(finding.rule in _EXPLAINED for finding in lint(model)):
            raise
        logger.warning("%s", refused.message)
        normalize(model, path)
        return model


def _is_whole(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    """Say whether a node has as many inputs and outputs as its op needs; the rules count on that."""
    if node.domain not in ("", "ai.onnx"):
        return True  # an op of somebody else, which the rules do not look into
    try:
        schema = onnx.defs.get_schema(node.op_type, opset_version(model))
    except onnx.defs.SchemaError:
        return True  # no op of that opset, which the rules do not look into either
    return len(node.input) >= schema.min_input and len(node.output) >= schema.min_output


def _require_readable_size(path: Path) -> None:
    """Refuse more weights than one message holds before they are read; they may lie in other files."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError, ValueError):
        return  # whoever reads the file says what is wrong with it
    _require_one_file(model, path)


def _require_one_file(model: onnx.ModelProto, path: str | Path) -> None:
    apart = sum(
        math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL and not tensor.raw_data
    )
    if apart + model.ByteSize() > _LARGEST_BYTES:
        raise _too_large(path)


def _too_large(path: str | Path) -> UsageError:
    return UsageError(
        f"{path} has more than 2 GB of weights, which is more than the linter can hold.",
        hint="Lint a model of the same architecture with smaller layers: the rules do not depend on their sizes.",
    )


def _difference(before: onnx.ModelProto, after: onnx.ModelProto, seed: int) -> Difference | str:
    """Compare the answers of both models; text where ONNX Runtime cannot run the first one.

    Raises:
        ModelError: It runs the first but not the second.
    """
    from trtdeploy.runtimes.onnxruntime.witness import Witness

    def refused(error: TrtDeployError) -> ModelError:
        return ModelError(
            f"The model cannot be repaired: ONNX Runtime takes it as it is, but not the result. {error.message}",
            hint="Nothing is written. Leave this model as it is, or quantize its float model: trtdeploy quantize",
        )

    try:
        original = Witness(before, name="the original model")
    except ModelError as error:
        return error.message
    try:
        repaired = Witness(after, original.outputs, name="the repaired model")
    except ModelError as error:
        raise refused(error) from error
    try:
        inputs = trial_inputs(before, [_sized(spec) for spec in original.inputs], {}, seed=seed).arrays
        old = original(inputs)
    except (UsageError, DtypeError) as error:
        return error.message
    except InferenceError as error:
        return f"random inputs: {error.message}"
    try:
        new = repaired(inputs)
    except InferenceError as error:
        raise refused(error) from error
    pairs = {
        name: (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for name, a, b in zip(original.outputs, old, new, strict=True)
        if np.asarray(a).dtype.kind in "fiub" and np.asarray(a).size
    }
    if not all(np.isfinite(a).all() for a, _ in pairs.values()):
        return "the answers of the original are not finite"
    return Difference(
        seed=seed,
        largest={name: float(np.abs(b - a).max()) for name, (a, b) in pairs.items()},
        largest_before={name: float(np.abs(a).max()) for name, (a, _) in pairs.items()},
        sqnr_db={
            name: round(sqnr_db(a, b), 2) if (a != b).any() and a.any() else None for name, (a, b) in pairs.items()
        },
    )


def _sized(spec: TensorSpec) -> TensorSpec:
    """Return an input with a size for every dimension that the model leaves open."""
    sizes = tuple(size if size > 0 else (_EDGE if place else _BATCH) for place, size in enumerate(spec.shape))
    return spec.model_copy(update={"shape": sizes})
