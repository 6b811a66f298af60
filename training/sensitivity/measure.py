"""Measure each layer alone: with only it quantized, and with only it in float.

The first says what a layer costs by itself, the second what it would bring to leave it out. Where errors add up or
cancel, the two orders differ, so both are measured.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from training.checkpoints.checkpoint import Checkpoint, layers_of
from training.predict import in_float32
from training.quantization import FloatLayer, QuantizedLayer, Quantizer, quantizers
from trtdeploy.data import Dataset
from trtdeploy.errors import UsageError
from trtdeploy.files import atomic_write, sha256_bytes
from trtdeploy.frozen_model import FrozenModel
from trtdeploy.ledger import StageOutputs
from trtdeploy.ledger.evaluation import Progress, map_labels
from trtdeploy.statistics import Interval, PairedDifference, sqnr_db

_log = logging.getLogger(__name__)

_BATCH = 128
_CPU = torch.device("cpu")
Split = Literal["calibration", "dev"]
Kind = Literal["layer", "activation"]
_Key = tuple[Kind, str]


class Effect(FrozenModel):
    """What a network with some quantizers on answers.

    Attributes:
        top1: Accuracy in percent.
        difference: Paired difference to the network that it is compared with, in percentage points.
        kl: Mean KL divergence of the softmax from the float network's, in nats.
        sqnr_db: Of the logits against the float network's; None where nothing differs.
    """

    top1: Interval
    difference: PairedDifference
    kl: float
    sqnr_db: float | None


class LayerSensitivity(FrozenModel):
    """One layer.

    Attributes:
        name: Of a layer with weights (its weight's and its input's quantizer), or the label of a quantizer that belongs
            to none: of a residual addition, a gate, a pooling or a concatenation.
        kind: Which of the two.
        only_quantized: Everything else in float, compared with the float network.
        only_float: Everything else quantized, compared with the network that is quantized everywhere.
    """

    name: str
    kind: Kind
    only_quantized: Effect
    only_float: Effect

    @property
    def title(self) -> str:
        """The name as a person reads it; a layer and the activation beside it may have the same one."""
        return self.name if self.kind == "layer" else f"{self.name} (activation)"


class Sensitivity(FrozenModel):
    """What ``measure_sensitivity`` found; ``layers`` come worst first, by ``only_quantized.kl``.

    ``in_float`` names the layers with weights that are not quantized, so that nothing could be measured.

    The order is that of the divergence and not of the accuracy, which moves in steps of one sample.
    """

    checkpoint_sha256: str
    split: Split
    images: int
    float_top1: Interval
    quantized: Effect
    layers: tuple[LayerSensitivity, ...]
    in_float: tuple[FloatLayer, ...] = ()


def measure_sensitivity(
    checkpoint: Checkpoint,
    dataset: Dataset,
    output: Path,
    *,
    split: Split = "dev",
    images: int | None = None,
    seed: int = 0,
    device: torch.device = _CPU,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure every layer of a ``ptq`` or ``qat`` checkpoint and write the result as JSON.

    Finished layers are kept in ``<output stem>.layers.jsonl`` beside the output until all are done, so that a killed
    run goes on where it was.

    Args:
        checkpoint: Its quantizers are switched on and off, and are on in the end.
        dataset: Labelled images.
        output: The ``.json`` file to write.
        split: The images to measure on.
        images: How many of them, drawn with ``seed``; all if None.
        seed: Decides which.
        device: Where the network and the images lie meanwhile; it computes in float32.
        progress: Called with the number of layers done.

    Raises:
        UsageError: The checkpoint is not quantized, or there are fewer images.
        LedgerError: An answer is not finite.
    """
    if checkpoint.facts.kind == "float":
        raise UsageError(f"{checkpoint.path} is not quantized.", hint="Give what `training calibrate` or `qat` wrote.")
    network = _Switched(checkpoint, dataset, split, images, seed, device)
    header = json.dumps(
        {"checkpoint": checkpoint.sha256, "images": sha256_bytes("\n".join(network.ids).encode()), "data": split}
    )
    kept = output.with_name(f"{output.stem}.layers.jsonl")
    done = _finished(kept, header)
    if not done:
        atomic_write(kept, header + "\n")
    exact = network.answers(on=())
    quantized = network.answers(on=network.everything)
    units = network.units
    for index, unit in enumerate(units):
        if unit.key not in done:
            others = [quantizer for quantizer in network.everything if quantizer not in unit.quantizers]
            row = LayerSensitivity(
                name=unit.name,
                kind=unit.kind,
                only_quantized=_effect(network.answers(on=unit.quantizers), against=exact, exact=exact),
                only_float=_effect(network.answers(on=others), against=quantized, exact=exact),
            )
            with open(kept, "a", encoding="utf-8") as stream:
                stream.write(row.model_dump_json() + "\n")
            done[unit.key] = row
        if progress:
            progress(index + 1, len(units))
    found = Sensitivity(
        checkpoint_sha256=checkpoint.sha256,
        split=split,
        images=len(network.ids),
        float_top1=exact.top1,
        quantized=_effect(quantized, against=exact, exact=exact),
        layers=tuple(sorted((done[unit.key] for unit in units), key=lambda row: -row.only_quantized.kl)),
        in_float=layers_of(checkpoint).in_float,
    )
    atomic_write(output, found.model_dump_json(indent=2) + "\n")
    kept.unlink()
    return found


@dataclass(frozen=True)
class _Unit:
    name: str
    kind: Kind
    quantizers: tuple[Quantizer, ...]

    @property
    def key(self) -> _Key:
        """What no other unit has: a layer may be called as the addition beside it is labelled."""
        return self.kind, self.name


class _Switched:
    """A network whose quantizers are switched on in any combination, over images that are preprocessed once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dataset: Dataset,
        split_name: Split,
        images: int | None,
        seed: int,
        device: torch.device,
    ) -> None:
        split = dataset.split(split_name)
        if images is not None and not 1 <= images <= len(split):
            raise UsageError(f"--images {images}: the {split_name} split of {dataset.name} has {len(split)} images.")
        chosen = np.arange(len(split))
        if images is not None:
            chosen = np.sort(np.random.default_rng(seed).choice(len(split), size=images, replace=False))
        preprocessing = checkpoint.facts.preprocessing
        self._model = checkpoint.model.eval().to(device)
        self._batches: list[Tensor] = []
        for start in range(0, len(chosen), _BATCH):
            pixels = split.pixels(preprocessing, chosen[start : start + _BATCH])
            inputs = torch.from_numpy(preprocessing.normalise(pixels))
            self._batches.append(inputs.to(device, memory_format=torch.channels_last))
        self.ids = tuple(split.ids[index] for index in chosen)
        self._labels = np.asarray(map_labels(dataset, checkpoint.facts.labels), dtype=np.int64)[split.labels[chosen]]
        self.everything = tuple(quantizer for _, quantizer in quantizers(self._model) if quantizer.enabled)
        self.units = tuple(_units(self._model, self.everything))

    def answers(self, *, on: Sequence[Quantizer]) -> StageOutputs:
        """Return the logits with only these quantizers on."""
        with _only(on, of=self.everything), torch.inference_mode(), in_float32():
            # a network may write into its input
            logits = np.concatenate([self._model(batch.clone()).float().cpu().numpy() for batch in self._batches])
        return StageOutputs(ids=self.ids, labels=self._labels, logits=logits)


def _units(model: nn.Module, everything: Sequence[Quantizer]) -> Iterator[_Unit]:
    taken: set[Quantizer] = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and not module.idle:
            own = (module.input_quantizer, module.weight_quantizer)
            taken.update(own)
            yield _Unit(name, "layer", tuple(quantizer for quantizer in own if quantizer in everything))
    for quantizer in everything:
        if quantizer not in taken:
            yield _Unit(quantizer.label, "activation", (quantizer,))


@contextmanager
def _only(on: Sequence[Quantizer], *, of: Sequence[Quantizer]) -> Iterator[None]:
    wanted = set(on)
    try:
        for quantizer in of:
            if quantizer not in wanted:
                quantizer.disable()
        yield
    finally:
        for quantizer in of:
            quantizer.enable()


def _effect(outputs: StageOutputs, *, against: StageOutputs, exact: StageOutputs) -> Effect:
    ratio = sqnr_db(exact.logits, outputs.logits)
    return Effect(
        top1=outputs.top1,
        difference=outputs.compared_with(against),
        kl=outputs.divergence_from(exact).mean,
        sqnr_db=ratio if math.isfinite(ratio) else None,
    )


def _finished(kept: Path, header: str) -> dict[_Key, LayerSensitivity]:
    """Read what a killed run with the same settings had finished; the line that it was writing is left out."""
    if not kept.is_file():
        return {}
    lines = kept.read_text(encoding="utf-8").split("\n")
    if lines[0] != header:
        _log.warning("%s belongs to a run on another checkpoint or other images; it is measured anew", kept)
        return {}
    rows: dict[_Key, LayerSensitivity] = {}
    for line in lines[1:-1]:
        try:
            row = LayerSensitivity.model_validate_json(line)
        except ValidationError:
            break
        rows[row.kind, row.name] = row
    # without the torn end, so that what is appended begins a line
    atomic_write(kept, "\n".join([header, *(row.model_dump_json() for row in rows.values())]) + "\n")
    return rows
