"""``trtdeploy quantize``: calibrate a float ONNX model and put Q/DQ where the target's rules want it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import version_converter

from trtdeploy.data.fixed_inputs import parse_fixed
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.data.samples import Opened, draw, ids_digest, open_samples
from trtdeploy.errors import DataError, InferenceError, ModelError, QuantizationError, UsageError
from trtdeploy.files import atomic_write, keep_inputs, sha256_bytes
from trtdeploy.ledger.evaluation import Progress, evaluate, map_labels
from trtdeploy.onnxgraph.graph import node_name, opset_version
from trtdeploy.onnxgraph.lint.quantization_check import require_quantization
from trtdeploy.onnxgraph.name_patterns import matches_any, require_matches
from trtdeploy.onnxgraph.qdq.layers import count_quantized
from trtdeploy.onnxgraph.qdq.pairs import put_in
from trtdeploy.onnxgraph.qdq.placement import Wanted, float32_sites, wanted_sites
from trtdeploy.onnxgraph.qdq.ranges_to_qdq import LOWEST_OPSET, require_float_model
from trtdeploy.onnxgraph.qdq.unsigned_codes import with_unsigned_activations
from trtdeploy.onnxgraph.reading.source import CALIBRATION_KEY, PREPROCESSING_KEY, SourceModel, keep_model, load_source
from trtdeploy.quantizing.closeness import WorstChannel, measure
from trtdeploy.quantizing.in_float import left_in_float
from trtdeploy.quantizing.method_choice import Candidate, Score, best_of, score_candidates
from trtdeploy.quantizing.observe import Observer
from trtdeploy.quantizing.options import PtqOptions
from trtdeploy.quantizing.output_scores import answers_of
from trtdeploy.quantizing.parting import Parts
from trtdeploy.quantizing.quantizers import Quantizers
from trtdeploy.runtimes.onnxruntime.witness import Witness, serialized
from trtdeploy.statistics import Interval
from trtdeploy.tensors import Array


@dataclass(frozen=True)
class DevScore:
    """Top-1 in percent of both models on the dev split, and percent of samples with the same answer."""

    n: int
    float_top1: Interval
    int8_top1: Interval
    agreement: float


@dataclass(frozen=True)
class Quantized:
    """Facts about the file that ``quantize`` wrote.

    Attributes:
        path: The file.
        sha256: Its digest.
        layers: Layers with constant weights.
        quantized_layers: Those of them that Q/DQ quantizes.
        activations: Quantized activation tensors.
        left_float: Why a layer with constant weights is not quantized, by its name.
        one_scale: Names of every ConvTranspose whose weight has one scale for all output channels.
        calibration: What the file's metadata says about calibration.
        output_sqnr_db: Signal to quantization noise of the answers (``output_scores``) to all samples; None where it is
            infinite or not defined.
        worst_channel: The channel of an answer that differs most; see ``closeness``.
        not_compared: Why ``output_sqnr_db`` is None.
        dev: Scores, where the data has labels that the model knows.
    """

    path: Path
    sha256: str
    layers: int
    quantized_layers: int
    activations: int
    left_float: dict[str, str]
    one_scale: tuple[str, ...]
    calibration: dict[str, Any]
    output_sqnr_db: float | None
    worst_channel: WorstChannel | None
    not_compared: str
    dev: DevScore | None

    def as_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        dev = self.dev and {
            "n": self.dev.n,
            "float_top1": self.dev.float_top1.model_dump(),
            "int8_top1": self.dev.int8_top1.model_dump(),
            "agreement": self.dev.agreement,
        }
        worst = self.worst_channel and asdict(self.worst_channel)
        return {**self.__dict__, "path": str(self.path), "worst_channel": worst, "dev": dev}


def quantize(
    model: str | Path,
    output: str | Path,
    data: str,
    options: PtqOptions | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Quantized:
    """Quantize a float ONNX model to explicit INT8 and write it.

    Args:
        model: A float ONNX file.
        output: The ``.onnx`` file to write.
        data: ``digits``, a folder or archive of ``<split>/<class>/*.jpg``, of which only the calibration split is
            calibrated with, or .npy / .npz files of model inputs.
        options: How.
        preprocessing: How images become model input, for a model whose metadata does not say so.
        progress: Called with a label, the samples done and the samples in all.

    Raises:
        ModelError: The file is no model that ONNX Runtime runs.
        QuantizationError: The model is quantized already, nothing in it can be quantized, or a value is not finite.
        DataError: The samples cannot be read, do not fit the model, or are all zeros.
        UsageError: A pattern matches nothing, options contradict each other, or nothing tells the methods apart.
    """
    options = options or PtqOptions()
    keep_model(output, model)
    keep_inputs(output, data)
    source = load_source(model)
    if source.preprocessing is not None and preprocessing is not None:
        raise UsageError(f"{model} says itself how images become its input; leave --preprocessing out.")
    preprocessing = source.preprocessing or preprocessing
    float_model = _prepared(source.proto)
    wanted = float32_sites(float_model, wanted_sites(float_model, target=options.target))
    given = Quantizers(float_model, _not_skipped(float_model, wanted, options.skip), options)
    answers = answers_of(float_model)
    fixed = parse_fixed(options.fixed, source.inputs)
    with open_samples(data, source.inputs, preprocessing, split_seed=options.split_seed, fixed=fixed) as opened:
        chosen = draw(opened.samples, options.images, options.seed)
        parts = Parts(source, opened.samples, chosen, options.batch_size, fixed=fixed)

        def shown(label: str) -> Progress:
            return lambda done, total: progress(label, done, total) if progress else None

        observed, held_out = parts.held_out() if options.method == "auto" else (parts.batches, [])
        read = parts.read(observed, shown("calibrating"))
        observer = Observer(float_model, given.keys)
        try:
            observer.look(read)
        except InferenceError as error:
            if not fixed or options.batch_size == 1:
                raise
            hint = f"Where {', '.join(fixed)} is what one sample gets, as a state is, give --batch 1."
            raise InferenceError(error.message, hint=hint) from error
        if not read.has_values:
            raise DataError(f"All {sum(map(len, observed))} samples are zeros, so no range can be found on them.")
        scores: dict[Candidate, Score] = {}
        if options.method != "auto":
            best = Candidate(options.method, options.percentile if options.method == "percentile" else None)
        else:
            scores = score_candidates(
                float_model,
                lambda candidate: put_in(float_model, given.of(observer.histograms, candidate)[0]),
                list(parts.read(held_out)),
                shown("choosing a method"),
                answers,
            )
            best = best_of(scores)
            observer.look(parts.read(held_out, shown("calibrating")))
        quantizers, without_room = given.of(observer.histograms, best)
        quantized = put_in(float_model, quantizers)
        calibration = {
            "method": best.method,
            "percentile": best.percentile,
            "candidates": {candidate.name: score.recorded for candidate, score in scores.items()},
            "judged_by": list(answers.types) if scores else [],
            "images": len(chosen),
            "seed": options.seed,
            "image_ids_sha256": ids_digest(opened.samples, chosen),
            "clamped_ranges": given.dead(observer.histograms, best),
            "target": options.target,
            "skip": list(options.skip),
            "transposed_weights": options.transposed_weights,
            "fixed": list(options.fixed),
            "float_sha256": source.sha256,
        }
        _set_metadata(quantized, calibration, preprocessing)
        require_quantization(quantized)
        if options.target == "onnxruntime":
            quantized = with_unsigned_activations(quantized)
        content = _checked(quantized)
        close = measure(answers, float_model, quantized, parts.read(parts.batches, shown("comparing")))
        dev = _score(source, float_model, quantized, opened, preprocessing, shown("scoring"))
    atomic_write(output, content)
    layers = count_quantized(quantized)
    return Quantized(
        path=Path(output),
        sha256=sha256_bytes(content),
        layers=layers.weighted_layers,
        quantized_layers=layers.quantized_layers,
        activations=len({each.tensor for each in quantizers.values() if each.tensor in given.keys}),
        left_float={**left_in_float(quantized, options.skip), **given.left_float, **without_room},
        one_scale=given.one_scale(quantizers),
        calibration=calibration,
        output_sqnr_db=close.sqnr_db,
        worst_channel=close.worst,
        not_compared=close.why,
        dev=dev,
    )


def _prepared(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float model with an opset that has what Q/DQ needs."""
    if opset_version(proto) < LOWEST_OPSET:
        try:
            proto = version_converter.convert_version(proto, LOWEST_OPSET)
        except Exception as error:  # the converter is C++ and raises RuntimeError for all it does not know
            raise ModelError(
                f"The model uses opset {opset_version(proto)}, and cannot be converted to {LOWEST_OPSET}: {error}",
                hint=f"Export it again with opset {LOWEST_OPSET} or later.",
            ) from error
    require_float_model(proto)
    return proto


def _not_skipped(model: onnx.ModelProto, sites: list[Wanted], skip: tuple[str, ...]) -> list[Wanted]:
    names = {node.output[0]: node_name(node) for node in model.graph.node if node.output}
    candidates = sorted({names[wanted.site[0]] for wanted in sites})
    require_matches(skip, candidates, kind="node that would be quantized")
    return [wanted for wanted in sites if not matches_any(names[wanted.site[0]], skip)]


def _checked(model: onnx.ModelProto) -> bytes:
    content = serialized(model)
    try:
        onnx.checker.check_model(content)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise QuantizationError(
            f"The quantized model would break ONNX's rules, so it is not written: {str(error).strip().splitlines()[0]}",
            hint="Export the float model again with a newer exporter; its IR version and opset may be too old.",
        ) from error
    return content


def _set_metadata(model: onnx.ModelProto, calibration: dict[str, Any], preprocessing: Preprocessing | None) -> None:
    known = {entry.key: entry.value for entry in model.metadata_props}
    known[CALIBRATION_KEY] = json.dumps(calibration)
    if preprocessing is not None:
        known[PREPROCESSING_KEY] = preprocessing.to_json()
    onnx.helper.set_model_props(model, known)


def _score(
    source: SourceModel,
    float_model: onnx.ModelProto,
    quantized: onnx.ModelProto,
    opened: Opened,
    preprocessing: Preprocessing | None,
    progress: Progress,
) -> DevScore | None:
    """Score both models on dev, where the dataset's classes are the model's labels and batches may have any size."""
    dataset = opened.dataset
    if dataset is None or preprocessing is None or source.labels is None or len(source.outputs) != 1:
        return None
    if not set(dataset.classes) <= set(source.labels) or source.inputs[0].shape[0] > 0:
        return None
    name, answer = source.inputs[0].name, [source.outputs[0].name]
    scores = []
    for model in (float_model, quantized):
        run = Witness(model, answer)

        def predict(inputs: Array, run: Callable[[Mapping[str, Array]], list[Array]] = run) -> Array:
            return run({name: inputs})[0]

        scored = evaluate(
            predict,
            dataset.split("dev"),
            preprocessing,
            label_map=map_labels(dataset, source.labels),
            batch_size=64,
            progress=progress,
        )
        scores.append(scored.outputs)
    return DevScore(len(scores[0].ids), scores[0].top1, scores[1].top1, scores[1].agreement(scores[0]))
