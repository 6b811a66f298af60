"""What the commands that write a checkpoint say about it, and how they record it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.cli.console import Display, print_facts
from trtdeploy.errors import UsageError
from trtdeploy.files import keep_inputs

if TYPE_CHECKING:
    import torch

    from training.checkpoints.checkpoint import Checkpoint, CheckpointFacts, SavedCheckpoint
    from trtdeploy.data import Dataset


def check_output(output: Path, suffix: str, *inputs: Path | None, ledger: Path | None = None) -> None:
    """Refuse, before any work is done, an output of another kind or in the place of an input, and what is no ledger.

    Raises:
        UsageError: The output has another suffix, or would replace an input.
        LedgerError: ``ledger`` exists and is none.
    """
    if output.suffix != suffix:
        raise UsageError(f"--output {output} must end in {suffix}.")
    keep_inputs(output, *inputs)
    check_ledger(ledger)


def check_ledger(ledger: Path | None) -> None:
    """Refuse, before any work is done, a file that is no ledger.

    Raises:
        LedgerError: ``ledger`` exists and is none.
    """
    if ledger is not None and ledger.exists():
        from trtdeploy.ledger import Ledger

        _ = Ledger(ledger).stages


def report(
    saved: SavedCheckpoint,
    dataset: Dataset,
    command: str,
    ledger: Path | None,
    display: Display,
    *,
    device: torch.device,
    as_json: bool,
) -> None:
    """Print what was written and, with a ledger, score it on the test split from the file, on ``device``."""
    facts = saved.as_json()
    dev = saved.facts.dev
    text = f"{saved.path}: {saved.facts.kind}"
    if dev is not None:
        scored = "dev top-1" if dev.against == "labels" else "dev agreement with the teacher"
        text += f", {scored} {dev.top1:.2f}% on {dev.n} images, {saved.seconds:.1f} s"
    layers = saved.facts.layers
    if ledger is not None:
        from training.checkpoints.checkpoint import load_checkpoint

        start = load_checkpoint(saved.path)
        facts["ledger"] = score_and_record(
            start, dataset, saved.facts.kind, ledger, f"training {command}", display, device=device
        )
        text += f"; test top-1 {shown_top1(facts['ledger'])}"
    display.finish()
    print_facts(facts, text if layers is None else f"{text}; {layers.text()}", as_json=as_json)


def shown_top1(record: dict[str, Any]) -> str:
    """Return a record's top-1 as people read it, with its interval."""
    top1 = record["top1"]
    return f"{top1['value']:.2f}% [{top1['low']:.2f}, {top1['high']:.2f}]"


def score_and_record(
    checkpoint: Checkpoint,
    dataset: Dataset,
    stage: Any,
    ledger: Path,
    command: str,
    display: Display,
    *,
    device: torch.device,
) -> dict[str, Any]:
    """Score a checkpoint on the test split, record it as ``stage`` and return the record as JSON.

    Its network is moved to ``device``, which the record names.
    """
    from training.predict import predictor
    from training.recording import record, score_split

    predict = predictor(checkpoint.model.to(device))
    evaluation = score_split(predict, checkpoint.facts, dataset, progress=display.images(f"scoring {stage}"))
    return record(
        ledger,
        stage,
        evaluation,
        predict=predict,
        facts=checkpoint.facts,
        dataset=dataset,
        file=checkpoint.path,
        sha256=checkpoint.sha256,
        command=command,
        device=device.type,
    )


def score_and_record_onnx(
    onnx: Path, facts: CheckpointFacts, dataset: Dataset, ledger: Path, command: str, display: Display
) -> dict[str, Any]:
    """Score an exported model on the test split, record it as the stage ``onnx`` and return the record as JSON.

    Args:
        onnx: The model, for ONNX Runtime.
        facts: Of the checkpoint that it was exported from.
        dataset: Whose test split is scored.
        ledger: Where to.
        command: What exported it.
        display: Shows progress.
    """
    from training.onnx_export import onnx_predictor
    from training.recording import record, score_split
    from trtdeploy.files import sha256_bytes

    content = onnx.read_bytes()
    predict = onnx_predictor(content)
    evaluation = score_split(predict, facts, dataset, progress=display.images("scoring onnx"))
    return record(
        ledger,
        "onnx",
        evaluation,
        predict=predict,
        facts=facts,
        dataset=dataset,
        file=onnx,
        sha256=sha256_bytes(content),
        command=command,
        device="cpu",
    )
