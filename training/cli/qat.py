"""``training qat``."""

from __future__ import annotations

from training.cli.arguments import open_both, schedule_from
from training.cli.console import Display
from training.cli.options import (
    AsJson,
    BatchSize,
    CheckpointPath,
    Data,
    Epochs,
    Flip,
    LearningRate,
    LedgerFile,
    MaxSteps,
    Output,
    Resume,
    Seed,
    Shift,
    SplitSeed,
)
from training.cli.reporting import check_suffix, report
from trtdeploy.cli.console import door


def qat(
    checkpoint: CheckpointPath,
    output: Output,
    data: Data = "digits",
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    shift: Shift = None,
    flip: Flip = False,
    seed: Seed = 0,
    split_seed: SplitSeed = None,
    resume: Resume = False,
    ledger: LedgerFile = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a calibrated checkpoint with quantization in the loop (QAT)."""
    with door(), Display() as display:
        from training.qat import default_schedule
        from training.qat import qat as run

        check_suffix(output, ".safetensors")
        start, dataset, split_seed = open_both(data, checkpoint, split_seed=split_seed)
        with dataset:
            # Steps alone mean as many passes as they take.
            saved = run(
                dataset,
                start,
                output,
                schedule=schedule_from(
                    default_schedule(dataset),
                    epochs or max_steps,
                    max_steps,
                    batch_size,
                    learning_rate,
                    shift,
                    flip,
                    seed,
                ),
                split_seed=split_seed,
                resume=resume,
                observer=display,
            )
            report(saved, dataset, "qat", ledger, display, as_json=as_json)
