"""``trtdeploy train qat``."""

from __future__ import annotations

from training.cli.arguments import distillation_from, open_both, open_teacher, schedule_from
from training.cli.console import Display
from training.cli.options import (
    Amp,
    AsJson,
    BatchSize,
    CheckpointPath,
    Data,
    Device,
    DeviceName,
    DistillOnly,
    Epochs,
    Flip,
    LearningRate,
    LedgerFile,
    MaxSteps,
    Output,
    Ranges,
    RangeTraining,
    Resume,
    Seed,
    Shift,
    SplitSeed,
    Teacher,
    TeacherWeight,
    Temperature,
    WorkerTimeout,
)
from training.cli.reporting import check_output, report
from trtdeploy.cli.console import door


def qat(
    checkpoint: CheckpointPath,
    output: Output,
    data: Data = "digits",
    ranges: Ranges = RangeTraining.learned,
    teacher: Teacher = None,
    teacher_weight: TeacherWeight = None,
    temperature: Temperature = None,
    distill_only: DistillOnly = False,
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
    """Fine-tune a calibrated checkpoint with quantization in the loop (QAT)."""
    with door(), Display() as display:
        from training.loop.distributed import joined_workers
        from training.loop.optimization import execution_for
        from training.qat.fine_tuning import default_schedule
        from training.qat.fine_tuning import qat as run

        check_output(output, ".safetensors", checkpoint, teacher, ledger=ledger)
        distillation = distillation_from(teacher, teacher_weight, temperature, distill_only=distill_only)
        execution = execution_for(device.value, amp=amp)
        start, dataset, split_seed = open_both(data, checkpoint, split_seed=split_seed)
        with dataset:
            with joined_workers(execution.device, timeout_s=worker_timeout) as workers:
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
                    ranges=ranges.value,
                    teacher=open_teacher(teacher, start) if teacher else None,
                    distillation=distillation,
                    split_seed=split_seed,
                    resume=resume,
                    workers=workers,
                    execution=execution,
                    observer=display,
                )
            if workers.is_main:
                report(saved, dataset, "qat", ledger, display, device=execution.device, as_json=as_json)
