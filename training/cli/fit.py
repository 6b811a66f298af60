"""``trtdeploy train fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training.cli.arguments import open_data, schedule_from
from training.cli.console import Display
from training.cli.options import (
    Amp,
    AsJson,
    BatchSize,
    Data,
    Device,
    DeviceName,
    Epochs,
    Flip,
    ImageSize,
    LearningRate,
    LedgerFile,
    MaxSteps,
    Model,
    Output,
    Resume,
    Seed,
    Shift,
    SplitSeed,
    WorkerTimeout,
)
from training.cli.reporting import check_output, report
from trtdeploy.cli.console import door


def fit(
    output: Output,
    data: Data = "digits",
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", help="Float checkpoint to start from.")] = None,
    model: Model = None,
    image_size: ImageSize = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    shift: Shift = None,
    flip: Flip = False,
    seed: Seed = 0,
    split_seed: SplitSeed = None,
    device: Device = DeviceName.auto,
    amp: Amp = False,
    worker_timeout: WorkerTimeout = 600.0,
    resume: Resume = False,
    ledger: LedgerFile = None,
    as_json: AsJson = False,
) -> None:
    """Train a float network and keep the epoch that scores best on dev."""
    with door(), Display() as display:
        from training.loop.distributed import joined_workers
        from training.loop.fit import default_schedule
        from training.loop.fit import fit as run
        from training.loop.optimization import execution_for

        check_output(output, ".safetensors", checkpoint, ledger=ledger)
        execution = execution_for(device.value, amp=amp)
        start, dataset, split_seed = open_data(
            data, checkpoint=checkpoint, model=model, image_size=image_size, split_seed=split_seed
        )
        with dataset:
            with joined_workers(execution.device, timeout_s=worker_timeout) as workers:
                saved = run(
                    dataset,
                    output,
                    schedule=schedule_from(
                        default_schedule(dataset), epochs, max_steps, batch_size, learning_rate, shift, flip, seed
                    ),
                    model=model,
                    image_size=image_size,
                    start=start,
                    split_seed=split_seed,
                    resume=resume,
                    workers=workers,
                    execution=execution,
                    observer=display,
                )
            if workers.is_main:
                report(saved, dataset, "fit", ledger, display, device=execution.device, as_json=as_json)
