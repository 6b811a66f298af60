"""The quantized network that sensitivity is measured on: the checkpoint that was given, or a float one calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from training.checkpoints.checkpoint import Checkpoint, load_checkpoint
from training.ptq.calibrate import calibrate
from training.quantization import QuantizationSpec
from training.quantization.toolkits.choice import Toolkit
from trtdeploy.data import Dataset
from trtdeploy.errors import UsageError
from trtdeploy.ledger.evaluation import Progress
from trtdeploy.onnxgraph.qdq.placement import Target

_CPU = torch.device("cpu")


def quantized_start(
    start: Checkpoint,
    dataset: Dataset,
    calibrated: Path,
    *,
    target: Target | None = None,
    toolkit: Toolkit | None = None,
    skip: Sequence[str] = (),
    split_seed: int = 0,
    device: torch.device = _CPU,
    progress: Progress | None = None,
) -> Checkpoint:
    """Return a checkpoint with quantizers.

    Args:
        start: Returned as it is if it has quantizers; calibrated with the default method if it is float.
        dataset: Whose calibration images are used.
        calibrated: The ``.safetensors`` file that then gets the result.
        target: As in ``QuantizationSpec``; the checkpoint's, or the default, if None.
        toolkit: Likewise.
        skip: Likewise; empty is None.
        split_seed: The one that the dataset was opened with.
        device: Where it is calibrated.
        progress: Called with the number of calibration images done.

    Raises:
        UsageError: The checkpoint was quantized otherwise than asked for, or a pattern matches no layer.
        QuantizationError: It cannot be calibrated.
    """
    asked = {"target": target, "toolkit": toolkit, "skip": tuple(skip) or None}
    given = {name: value for name, value in asked.items() if value is not None}
    if start.facts.kind != "float":
        made = (start.facts.quantization or QuantizationSpec()).model_dump()
        for name, value in given.items():
            if made[name] != value:
                raise UsageError(
                    f"{start.path} is quantized already, with {name} {_shown(made[name])}, not {_shown(value)}.",
                    hint=f"Leave out --{name}, or give the float checkpoint, which is then calibrated so.",
                )
        return start
    spec = QuantizationSpec.model_validate(given)
    calibrate(dataset, start, calibrated, spec=spec, split_seed=split_seed, device=device, progress=progress)
    return load_checkpoint(calibrated)


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) or "nothing" if isinstance(value, tuple) else str(value)
