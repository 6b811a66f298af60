"""Checkpoints: our own, which say what they are, and other people's, which do not.

Ours is one ``.safetensors`` file: the state dict, and in its metadata, under the key ``trtdeploy``, the JSON of
``CheckpointFacts``. Nothing is ever unpickled but tensors and primitives (``torch.load(weights_only=True)``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationError
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from training.checkpoints.weights import read_metadata, read_safetensors, read_torch, refuse_non_finite, shown
from training.models import DEFAULT_MODEL, create_model
from training.predict import device_of
from training.quantization import (
    LayerCount,
    QuantizationSpec,
    QuantizedLayer,
    count_layers,
    quantize,
    reserve_ranges,
)
from trtdeploy.calibration import Method
from trtdeploy.data import Dataset
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import CheckpointError, TrtDeployError
from trtdeploy.file_format import FileFormat
from trtdeploy.files import atomic_write, sha256_file
from trtdeploy.frozen_model import FrozenModel
from trtdeploy.version import __version__

_log = logging.getLogger(__name__)

METADATA_KEY = "trtdeploy"
Kind = Literal["float", "ptq", "qat"]


class DatasetFacts(FrozenModel):
    """Which images a checkpoint was made with; the fingerprint covers every sample's split."""

    name: str
    fingerprint: str
    split_seed: int


class TrainingFacts(FrozenModel):
    """How the weights were last trained. ``best_epoch`` 0 means that training improved on nothing it started from.

    ``ranges`` says what became of the ranges of a quantized network, ``starting_ranges`` whether learning began with
    those of the parent or with some taken anew. ``teacher_*`` are those of distillation.
    """

    images: int
    epochs: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    best_epoch: int
    ranges: Literal["frozen", "learned"] | None = None
    starting_ranges: Literal["checkpoint", "relative-mse"] | None = None
    teacher_sha256: str | None = None
    teacher_weight: float | None = None
    teacher_temperature: float | None = None


class DevMetrics(FrozenModel):
    """Score on the dev split: top-1 in percent and mean cross-entropy in nats.

    Against a teacher, where there were no labels: agreement in percent and mean divergence in nats.
    """

    top1: float
    loss: float
    n: int
    against: Literal["labels", "teacher"] = "labels"


class CalibrationCandidate(FrozenModel):
    """A method that was tried for the ranges of activations, and its score on dev."""

    method: Method
    percentile: float | None
    dev: DevMetrics


class BiasCorrectionFacts(FrozenModel):
    """On how many images how many biases were corrected, which layers have none, and the score on dev before."""

    images: int
    corrected: int
    left_out: tuple[str, ...]
    dev_before: DevMetrics


class CalibrationFacts(FrozenModel):
    """How the ranges were found, and from which images.

    Attributes:
        image_ids_sha256: Over the sorted identifiers, one per line.
        pixels_sha256: Over the decoded pixels, uint8, in the order of the dataset; None if it was not recorded.
        clamped_ranges: How many ranges were 0, or too small for a scale, and so are replaced.
        idle_layers: Layers that never ran, and so have no ranges and stay in float.
        candidates: What was tried where the method was to be the best of all; the ranges are those of the best.
        bias_correction: None if there was none.
    """

    method: Method
    percentile: float | None
    images: int
    seed: int
    image_ids_sha256: str
    pixels_sha256: str | None = None
    clamped_ranges: int
    idle_layers: tuple[str, ...] = ()
    candidates: tuple[CalibrationCandidate, ...] = ()
    bias_correction: BiasCorrectionFacts | None = None


class CheckpointFacts(FileFormat):
    """What a checkpoint says about itself.

    Attributes:
        kind: ``float``, or INT8 fake-quantized after calibration (``ptq``) or fine-tuning (``qat``).
        model: A name that ``training.models.create_model`` understands.
        labels: Class names; output ``i`` scores ``labels[i]``.
        preprocessing: How images become model input.
        quantization: Where the quantizers are; None for a float checkpoint.
        layers: Which layers with weights are in INT8, and why the others are not; None for a float checkpoint.
        parent_sha256: Digest of the checkpoint file that this one was made from.
        version: Of trtdeploy, when it was written.
    """

    TITLE: ClassVar[str] = "a checkpoint"
    ERROR: ClassVar[type[TrtDeployError]] = CheckpointError
    EXACT: ClassVar[tuple[str, ...]] = ("preprocessing", "quantization")

    format: Literal[1] = 1
    minor: int = Field(default=1, ge=0)
    kind: Kind
    model: str
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    dataset: DatasetFacts | None = None
    training: TrainingFacts | None = None
    calibration: CalibrationFacts | None = None
    quantization: QuantizationSpec | None = None
    layers: LayerCount | None = None
    dev: DevMetrics | None = None
    parent_sha256: str | None = None
    version: str = __version__


@dataclass(frozen=True)
class Checkpoint:
    """A network in evaluation mode with what is known about it; ``sha256`` is the file's."""

    path: Path
    model: nn.Module
    facts: CheckpointFacts
    sha256: str


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that a command wrote; ``seconds`` is the wall time that making it took."""

    path: Path
    sha256: str
    facts: CheckpointFacts
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        facts = self.facts.model_dump(mode="json")
        return {"checkpoint": str(self.path), "sha256": self.sha256, "seconds": round(self.seconds, 2), **facts}


def save_checkpoint(path: str | Path, state: Mapping[str, Tensor], facts: CheckpointFacts) -> str:
    """Write a checkpoint as a whole and return the file's SHA-256.

    Raises:
        CheckpointError: A value is not finite; nothing is written.
    """
    refuse_non_finite(Path(path), state)
    # Cloned, because safetensors refuses tensors that share memory or are not laid out in row-major order.
    tensors = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    atomic_write(path, safetensors_bytes(tensors, metadata={METADATA_KEY: facts.model_dump_json()}))
    return sha256_file(path)


def load_checkpoint(
    path: str | Path,
    *,
    model: str | None = None,
    image_size: int | None = None,
    dataset: Dataset | None = None,
    like: CheckpointFacts | None = None,
) -> Checkpoint:
    """Load any checkpoint strictly: every key must be there, and no other.

    Args:
        path: A ``.safetensors``, ``.pt`` or ``.pth`` file.
        model: What the network is, for a checkpoint that does not say so.
        image_size: Side of its square input in pixels, likewise.
        dataset: Gives the labels, likewise.
        like: What such a float checkpoint is taken to be, in place of all the options.

    Raises:
        CheckpointError: The file is missing, corrupt, unsafe to load or does not fit; the message names it.
        UsageError: ``model`` is no model.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint at {path}.")
    if path.suffix == ".safetensors":
        state, text = read_safetensors(path), read_metadata(path, METADATA_KEY)
    else:
        state, text = read_torch(path), None
    refuse_non_finite(path, state)
    if text is None and like is not None:
        facts = CheckpointFacts(kind="float", model=like.model, labels=like.labels, preprocessing=like.preprocessing)
    elif text is None:
        facts = _facts_from_options(path, model=model, image_size=image_size, dataset=dataset)
    else:
        facts = _parse_facts(path, text)
        for option, given, known in (("--model", model, facts.model), ("--image-size", image_size, _size_of(facts))):
            if given is not None and given != known:
                raise CheckpointError(f"{path} was made with {option} {known}, not {given}; leave the option out.")
    network = create_model(facts.model, num_classes=len(facts.labels))
    if facts.kind != "float":
        if facts.quantization is None:
            raise CheckpointError(
                f"{path} is quantized ({facts.kind}) but does not say where its quantizers are; an older version wrote "
                "it.",
                hint="Calibrate the float checkpoint again: trtdeploy train calibrate",
            )
        example = torch.zeros(1, *facts.preprocessing.sample_shape)
        if "transposed_weights" not in facts.quantization.model_fields_set:  # an older version wrote it
            older = facts.quantization.model_copy(update={"transposed_weights": "per-channel"})
            facts = facts.model_copy(update={"quantization": older})
        network = quantize(network, facts.quantization, example=example)
        _leave_idle(path, network, facts)
        reserve_ranges(network)
    _load_strictly(path, network, state, facts)
    check_output_width(network, facts.preprocessing, len(facts.labels), source=str(path))
    return Checkpoint(path=path, model=network.eval(), facts=facts, sha256=sha256_file(path))


def layers_of(checkpoint: Checkpoint) -> LayerCount:
    """Return which layers of a checkpoint are in INT8: as it says, or counted where it does not say."""
    facts = checkpoint.facts
    if facts.layers is not None:
        return facts.layers
    example = torch.zeros(1, *facts.preprocessing.sample_shape, device=device_of(checkpoint.model))
    return count_layers(checkpoint.model, example, spec=facts.quantization)


def split_seed_of(path: Path) -> int:
    """Return the split seed that a checkpoint was made with, without loading its weights; 0 if it does not say.

    Raises:
        CheckpointError: The file is missing or corrupt.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return 0
    text = read_metadata(path, METADATA_KEY)
    facts = _parse_facts(path, text) if text is not None else None
    return facts.dataset.split_seed if facts and facts.dataset else 0


def dataset_facts(dataset: Dataset, *, split_seed: int) -> DatasetFacts:
    """Describe a dataset; only the last part of its path is kept, which is all that others can use."""
    return DatasetFacts(name=Path(dataset.name).name, fingerprint=dataset.fingerprint, split_seed=split_seed)


def warn_of_other_splits(checkpoint: Checkpoint, dataset: Dataset) -> None:
    """Say so in the log if a checkpoint was trained on other splits: its training images may be tested on here."""
    known = checkpoint.facts.dataset
    if known is not None and known.fingerprint != dataset.fingerprint:
        _log.warning(
            "%s was made with other data or splits (%s, split seed %d) than the ones given; if the images are the "
            "same, some that it was trained on may be in dev or test now",
            checkpoint.path,
            known.name,
            known.split_seed,
        )


def default_image_size(dataset: Dataset) -> int:
    """Return the side in pixels of model inputs where nothing says otherwise: 32 for digits (8x8 images), else 64."""
    return 32 if dataset.name == "digits" else 64


def check_output_width(model: nn.Module, preprocessing: Preprocessing, width: int, *, source: str) -> None:
    """Run one black image through the network and compare what comes out with the number of labels.

    Raises:
        CheckpointError: The network cannot run on such an image, or scores another number of classes.
    """
    model.eval()
    try:
        with torch.inference_mode():
            scores = model(torch.zeros(1, *preprocessing.sample_shape))
    except Exception as error:  # somebody else's network may fail in any way
        shape = list(preprocessing.sample_shape)
        raise CheckpointError(f"{source}: the network cannot run on one image of shape {shape}: {error}.") from error
    if not isinstance(scores, Tensor) or scores.shape != (1, width):
        given = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise CheckpointError(
            f"{source}: the network answers one image with {given}; expected class scores of shape [1, {width}], "
            f"one for each of the {width} labels."
        )


def _facts_from_options(
    path: Path, *, model: str | None, image_size: int | None, dataset: Dataset | None
) -> CheckpointFacts:
    if dataset is None:
        raise CheckpointError(f"{path} does not say what its classes are called.", hint="Give --data for its labels.")
    return CheckpointFacts(
        kind="float",
        model=model or DEFAULT_MODEL,
        labels=dataset.classes,
        preprocessing=Preprocessing.square(image_size or default_image_size(dataset)),
    )


def _parse_facts(path: Path, text: str) -> CheckpointFacts:
    try:
        return CheckpointFacts.read(text, path)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{path} carries facts that this version does not understand: {where}: {first['msg']}."
        ) from error


def _leave_idle(path: Path, network: nn.Module, facts: CheckpointFacts) -> None:
    layers = {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLayer)}
    for name in facts.calibration.idle_layers if facts.calibration else ():
        if name not in layers:
            raise CheckpointError(f"{path} says that the layer {name} never ran; {facts.model} has no such layer.")
        layers[name].leave_in_float()


def _size_of(facts: CheckpointFacts) -> int:
    return facts.preprocessing.sample_shape[1]


def _load_strictly(path: Path, network: nn.Module, state: Mapping[str, Tensor], facts: CheckpointFacts) -> None:
    expected = network.state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    reshaped = [
        f"{key} is {list(state[key].shape)}, expected {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = [
        f"{len(keys)} {what}: {shown(keys)}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if keys
    ]
    if problems:
        only_quantizers = not reshaped and all("_quantizer." in key for key in (*missing, *unexpected))
        raise CheckpointError(
            f"{path} does not fit {facts.model} with {len(facts.labels)} classes. Keys: {'; '.join(problems)}.",
            hint="An older version put quantizers elsewhere in this network. Calibrate the float checkpoint again: "
            "trtdeploy train calibrate"
            if only_quantizers
            else "Give the --model it was trained as, and the --data it was trained on.",
        )
    network.load_state_dict(state, strict=True)
