"""``trtdeploy train export``."""

from __future__ import annotations

from typing import Annotated

import typer

from training.cli.arguments import open_both
from training.cli.console import Display, print_facts
from training.cli.options import (
    AsJson,
    CheckpointPath,
    Data,
    ImageSize,
    LedgerFile,
    Model,
    Output,
    SplitSeed,
)
from training.cli.reporting import check_output, score_and_record_onnx, shown_top1
from trtdeploy.cli.console import door


def export(
    checkpoint: CheckpointPath,
    output: Output,
    data: Data = "digits",
    opset: Annotated[int, typer.Option("--opset", help="Version of the ONNX operators, 17 to 20.")] = 17,
    model: Model = None,
    image_size: ImageSize = None,
    split_seed: SplitSeed = None,
    ledger: LedgerFile = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as ONNX, with Q/DQ where it is quantized, after comparing its answers with torch's."""
    with door(), Display() as display:
        from training.onnx_export import export_checkpoint as run

        check_output(output, ".onnx", ledger=ledger)
        start, dataset, _ = open_both(data, checkpoint, model=model, image_size=image_size, split_seed=split_seed)
        with dataset:
            exported = run(start, output, dataset, opset=opset)
            facts = exported.as_json()
            text = (
                f"{output}: opset {opset}, {exported.quantize_nodes} Q and {exported.dequantize_nodes} DQ nodes; "
                f"{exported.parity.disagreements} of {exported.parity.images} answers differ from torch's"
            )
            if ledger is not None:
                facts["ledger"] = score_and_record_onnx(
                    output, start.facts, dataset, ledger, "training export", display
                )
                text += f"; test top-1 {shown_top1(facts['ledger'])}"
            if exported.quantize_nodes:
                text += f"; {exported.layers.text()}"
            display.finish()
            print_facts(facts, text, as_json=as_json)
