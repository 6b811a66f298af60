"""``trtdeploy train evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training.cli.arguments import open_both
from training.cli.console import Display, print_facts
from training.cli.options import (
    AsJson,
    CheckpointPath,
    Data,
    Device,
    DeviceName,
    ImageSize,
    Model,
    ScoredSplit,
    ScoredStage,
    SplitSeed,
)
from training.cli.reporting import score_and_record
from trtdeploy.cli.console import door
from trtdeploy.errors import UsageError


def evaluate(
    checkpoint: CheckpointPath,
    data: Data = "digits",
    split: Annotated[ScoredSplit, typer.Option("--split", help="Which images to score.")] = ScoredSplit.test,
    stage: Annotated[
        ScoredStage | None, typer.Option("--stage", help="Record under this stage (default: what the checkpoint is).")
    ] = None,
    model: Model = None,
    image_size: ImageSize = None,
    split_seed: SplitSeed = None,
    device: Device = DeviceName.auto,
    ledger: Annotated[Path | None, typer.Option("--ledger", help="Record in this accuracy ledger.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score a checkpoint: top-1 in percent with its 95% interval."""
    with door(), Display() as display:
        from training.loop.optimization import execution_for
        from training.predict import predictor
        from training.recording import score_split

        if ledger is not None and split is not ScoredSplit.test:
            raise UsageError(f"--ledger compares stages on the test split; --split {split.value} cannot be recorded.")
        place = execution_for(device.value).device
        start, dataset, _ = open_both(data, checkpoint, model=model, image_size=image_size, split_seed=split_seed)
        name = stage.value if stage else start.facts.kind
        with dataset:
            if ledger is not None:
                facts = score_and_record(start, dataset, name, ledger, "training evaluate", display, device=place)
            else:
                evaluation = score_split(
                    predictor(start.model.to(place)),
                    start.facts,
                    dataset,
                    split=split.value,
                    progress=display.images("scoring"),
                )
                top1 = evaluation.outputs.top1
                facts = {
                    "n": len(evaluation.outputs.ids),
                    "top1": top1.model_dump(),
                    "seconds": round(evaluation.seconds, 3),
                }
            interval = facts["top1"]
            text = (
                f"{split.value} top-1 {interval['value']:.2f}% [{interval['low']:.2f}, {interval['high']:.2f}] "
                f"on {facts['n']} images"
            )
            display.finish()
            print_facts(
                {"checkpoint": str(checkpoint), "kind": start.facts.kind, "split": split.value, **facts},
                text,
                as_json=as_json,
            )
