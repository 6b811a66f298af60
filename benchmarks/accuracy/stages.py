"""The same answers at every stage: fake-quantized network, Q/DQ ONNX, built plan, served model.

Takes a quantized checkpoint down the road with the commands that a user would type, into one ledger.

    python -m benchmarks.accuracy.stages QUANTIZED.safetensors --data ../shared/data/cifar10.tar.xz
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.accuracy.results import CIFAR10, Table, require, write_result
from training.checkpoints.checkpoint import load_checkpoint
from trtdeploy.ledger import Ledger
from trtdeploy.triton.server.installation import find_tritonserver
from trtdeploy.triton.server.process import TritonServer

NAME = "stages"
LEAST_AGREEMENT = 99.5


def run(*command: str | Path) -> None:
    """Run a command of this project and fail with it."""
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True, stdout=sys.stderr)


def main() -> int:
    """Run all stages; exit code 1 if two that follow each other agree in fewer answers than they should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, default=CIFAR10)
    arguments = parser.parse_args()
    require(arguments.checkpoint, arguments.data)
    start = load_checkpoint(arguments.checkpoint)
    data = ("--data", arguments.data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ledger, model, plan = folder / "ledger.json", folder / "model.onnx", folder / "model.plan"
        _, height, width = start.facts.preprocessing.sample_shape
        shape = f"input=1x3x{height}x{width}:1x3x{height}x{width}:32x3x{height}x{width}"
        run("training", "evaluate", arguments.checkpoint, *data, "--ledger", ledger)
        run("training", "export", arguments.checkpoint, "-o", model, *data, "--ledger", ledger)
        run("trtdeploy", "build", model, "-o", plan, "--shape", shape)
        run("trtdeploy", "validate", "--plan", plan, *data, "--ledger", ledger)
        run("trtdeploy", "package", plan, "--name", "model", "--repository", folder / "models")
        with TritonServer(
            folder / "models", find_tritonserver(None), http_port=0, grpc_port=0, metrics_port=0
        ) as server:
            run("trtdeploy", "validate", "--url", server.grpc_url, "--model", "model", *data, "--ledger", ledger)
        stages = Ledger(ledger).stages
    table = Table(
        "The same answers at every stage",
        ("stage", "test top-1 %", "agreement with the stage before %"),
        tuple(
            (stage, record.top1.format(), "" if record.agreement is None else f"{record.agreement:.2f}")
            for stage, record in stages.items()
        ),
        note=f"{next(iter(stages.values())).n} test images; checkpoint: {start.facts.kind}.",
    )
    facts = {
        "checkpoint": {"kind": start.facts.kind, "sha256": start.sha256},
        "stages": {stage: record.model_dump(mode="json", exclude={"source"}) for stage, record in stages.items()},
    }
    sys.stdout.write(f"{write_result(NAME, facts, tables=[table])}\n")
    agreements = [record.agreement for record in stages.values() if record.agreement is not None]
    return int(min(agreements) < LEAST_AGREEMENT)


if __name__ == "__main__":
    sys.exit(main())
