"""``training export``."""

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
from training.cli.reporting import check_output
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
        from training.export import export as run
        from training.export import onnx_predictor
        from training.recording import record, score_split

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
                predict = onnx_predictor(output.read_bytes())
                evaluation = score_split(predict, start.facts, dataset, progress=display.images("scoring"))
                facts["ledger"] = record(
                    ledger,
                    "onnx",
                    evaluation,
                    predict=predict,
                    facts=start.facts,
                    dataset=dataset,
                    file=output,
                    sha256=exported.sha256,
                    command="training export",
                )
                text += f"; test top-1 {evaluation.outputs.top1.format()}%"
            display.finish()
            print_facts(facts, text, as_json=as_json)
