"""Architectures that nothing was tuned for go through ``training auto`` untouched: residual adds, and concatenations.

``python -m benchmarks.accuracy.architectures --work DIR`` trains each float network with several seeds, runs ``decide``
on each and asks the linter, the TensorRT-RTX builder and ONNX Runtime about the exported model. What is in DIR is not
repeated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.accuracy.results import CIFAR10, Table, require, write_result
from trtdeploy.cli.console import door

_NETWORKS = ("resnet", "densenet")


def main(
    work: Annotated[Path, typer.Option("--work", file_okay=False, help="Keeps checkpoints between runs.")],
    data: Annotated[Path, typer.Option("--data")] = CIFAR10,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Float networks of each architecture.")] = 3,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Of the float trainings.")] = 3,
    max_drop: Annotated[float, typer.Option("--max-drop", help="In percentage points.")] = 0.5,
) -> None:
    """Measure, and write ``results/accuracy/architectures.json``."""
    with door():
        require(data)
        from trtdeploy.data import open_dataset

        with open_dataset(str(data)) as dataset:
            found = {
                name: [
                    _through(dataset, name, seed, work / f"{name}-{seed}", epochs, max_drop) for seed in range(seeds)
                ]
                for name in _NETWORKS
            }
        runs = [(name, seed, facts) for name, each in found.items() for seed, facts in enumerate(each)]
        rows = [
            (
                name,
                str(seed),
                trial["step"],
                f"{trial['top1']['value']:.2f}",
                f"{trial['difference']['difference']['value']:+.2f}",
                "yes" if trial["proof"]["shown"] else "no",
                f"{trial['seconds']:.0f}",
            )
            for name, seed, facts in runs
            for trial in facts["decision"]["trials"]
        ]
        table = Table(
            title="Architectures that nobody tuned for, through `training auto`",
            columns=("network", "seed", "step", "dev top-1 %", "against float", "shown", "seconds"),
            rows=tuple(rows),
            note=" ".join(f"{name}, seed {seed}: {facts['verdict']}" for name, seed, facts in runs),
        )
        path = write_result("architectures", {"max_drop": max_drop, "networks": found}, tables=(table,))
        typer.echo(str(path))


def _through(dataset: Any, name: str, seed: int, folder: Path, epochs: int, max_drop: float) -> dict[str, Any]:
    from training.auto import decide
    from training.checkpoints.checkpoint import load_checkpoint
    from training.loop.augmentation import Augmentation
    from training.loop.fit import fit
    from training.loop.schedule import Schedule

    start = folder / "float.safetensors"
    if not start.is_file():
        schedule = Schedule(
            epochs=epochs,
            batch_size=128,
            learning_rate=4e-3,
            seed=seed,
            augmentation=Augmentation(shift_px=2, flip=True),
        )
        model = f"benchmarks.accuracy.small_networks:thin_{name}"
        fit(dataset, start, schedule=schedule, model=model, image_size=32)
    checkpoint = load_checkpoint(start)
    trained = checkpoint.facts.training
    decision = decide(
        dataset,
        checkpoint,
        folder / "auto",
        max_drop=max_drop,
        say=lambda line: typer.echo(f"{name}, seed {seed}: {line}", err=True),
    )
    return {
        "training": trained.model_dump(mode="json") if trained else None,
        "verdict": decision.verdict,
        "decision": decision.model_dump(mode="json"),
        "checks": _checks(folder / "auto" / decision.onnx, folder / "plans"),
    }


def _checks(model: Path, folder: Path) -> dict[str, Any]:
    """Ask the command line, as a user would: the linter, and the builders of TensorRT-RTX and ONNX Runtime."""
    from typer.testing import CliRunner

    from trtdeploy.cli.main import app

    folder.mkdir(parents=True, exist_ok=True)
    lint = CliRunner().invoke(app, ["lint", str(model), "--json"])
    checks: dict[str, Any] = {"lint": {"exit_code": lint.exit_code, "report": json.loads(lint.stdout or "null")}}
    for runtime in ("tensorrt-rtx", "onnxruntime"):
        plan = folder / f"{runtime}.plan"
        built = CliRunner().invoke(app, ["build", str(model), "-o", str(plan), "--runtime", runtime])
        checks[runtime] = {"exit_code": built.exit_code, "said": built.output.replace(f"{folder}/", "")[-500:]}
    return checks


if __name__ == "__main__":
    typer.run(main)
