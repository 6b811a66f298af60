"""``training auto``."""

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
    ImageSize,
    Model,
    Skip,
    SplitSeed,
    Target,
    TargetName,
    Toolkit,
    ToolkitName,
)
from trtdeploy.cli.console import door


def auto(
    checkpoint: CheckpointPath,
    output: Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="The folder to write.")],
    data: Data = "digits",
    max_drop: Annotated[
        float, typer.Option("--max-drop", help="The accuracy that may be lost, in percentage points.")
    ] = 0.5,
    target: Target = TargetName.tensorrt,
    toolkit: Toolkit = ToolkitName.pytorch_quantization,
    skip: Skip = None,
    model: Model = None,
    image_size: ImageSize = None,
    split_seed: SplitSeed = None,
    as_json: AsJson = False,
) -> None:
    """Answer 'PTQ or QAT?': the cheapest quantization whose drop is shown to be inside the budget.

    Exit code 1 if that is shown for none; the best that was found is exported all the same. Repeating the command goes
    on where an interrupted one was; a folder that holds a run with other settings is refused.
    """
    with door(), Display() as display:
        from training.auto import decide
        from training.quantization import QuantizationSpec

        start, dataset, split_seed = open_both(
            data, checkpoint, model=model, image_size=image_size, split_seed=split_seed
        )
        with dataset:
            decision = decide(
                dataset,
                start,
                output,
                max_drop=max_drop,
                spec=QuantizationSpec(target=target.value, toolkit=toolkit.value, skip=tuple(skip or ())),
                split_seed=split_seed,
                say=lambda line: typer.echo(line, err=True),
                observer=display,
            )
        display.finish()
        facts = {"output": str(output), "verdict": decision.verdict, **decision.model_dump(mode="json")}
        print_facts(facts, f"{decision.verdict}\nWhy: {output / 'decision.md'}", as_json=as_json)
        if not decision.met:
            raise typer.Exit(1)
