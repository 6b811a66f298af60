"""``trtdeploy train auto``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training.cli.arguments import open_both
from training.cli.console import Display, print_facts
from training.cli.options import (
    Amp,
    AsJson,
    CheckpointPath,
    Data,
    Device,
    DeviceName,
    ImageSize,
    LedgerFile,
    Model,
    Skip,
    SplitSeed,
    Target,
    TargetName,
    Toolkit,
    ToolkitName,
    TransposedWeights,
    TransposedWeightsName,
)
from training.cli.reporting import check_ledger, score_and_record, score_and_record_onnx
from trtdeploy.cli.console import door

if TYPE_CHECKING:
    import torch

    from training.auto import Decision
    from training.checkpoints.checkpoint import Checkpoint
    from trtdeploy.data import Dataset

_COMMAND = "training auto"


def auto(
    checkpoint: CheckpointPath,
    output: Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="The folder to write.")],
    data: Data = "digits",
    max_drop: Annotated[
        float, typer.Option("--max-drop", help="The accuracy that may be lost, in percentage points.")
    ] = 0.5,
    target: Target = TargetName.tensorrt,
    toolkit: Toolkit = ToolkitName.pytorch_quantization,
    transposed_weights: TransposedWeights = TransposedWeightsName.per_tensor,
    skip: Skip = None,
    model: Model = None,
    image_size: ImageSize = None,
    split_seed: SplitSeed = None,
    device: Device = DeviceName.auto,
    amp: Amp = False,
    ledger: LedgerFile = None,
    as_json: AsJson = False,
) -> None:
    """Answer 'PTQ or QAT?': the cheapest quantization whose drop is shown to be inside the budget.

    Exit code 1 if that is shown for none; the best that was found is exported all the same. Repeating the command goes
    on where an interrupted one was; a folder that holds a run with other settings is refused. With --ledger the float
    network, the chosen one and its ONNX are recorded, as the commands that make them one by one do.
    """
    with door(), Display() as display:
        from training.auto import decide
        from training.loop.optimization import execution_for
        from training.quantization import QuantizationSpec

        check_ledger(ledger)
        execution = execution_for(device.value, amp=amp)
        start, dataset, split_seed = open_both(
            data, checkpoint, model=model, image_size=image_size, split_seed=split_seed
        )
        with dataset:
            decision = decide(
                dataset,
                start,
                output,
                max_drop=max_drop,
                spec=QuantizationSpec(
                    target=target.value,
                    toolkit=toolkit.value,
                    skip=tuple(skip or ()),
                    transposed_weights=transposed_weights.value,
                ),
                split_seed=split_seed,
                execution=execution,
                say=lambda line: typer.echo(line, err=True),
                observer=display,
            )
            if ledger is not None:
                _record(start, output, decision, dataset, ledger, display, execution.device)
        display.finish()
        facts = {"output": str(output), "verdict": decision.verdict, **decision.model_dump(mode="json")}
        print_facts(facts, f"{decision.verdict}\nWhy: {output / 'decision.md'}", as_json=as_json)
        if not decision.met:
            raise typer.Exit(1)


def _record(
    start: Checkpoint,
    output: Path,
    decision: Decision,
    dataset: Dataset,
    ledger: Path,
    display: Display,
    device: torch.device,
) -> None:
    from training.checkpoints.checkpoint import load_checkpoint
    from training.recording import has_stage

    if not has_stage(ledger, "float"):
        score_and_record(start, dataset, "float", ledger, _COMMAND, display, device=device)
    chosen = load_checkpoint(output / decision.chosen)
    score_and_record(chosen, dataset, chosen.facts.kind, ledger, _COMMAND, display, device=device)
    score_and_record_onnx(output / decision.onnx, chosen.facts, dataset, ledger, _COMMAND, display)
