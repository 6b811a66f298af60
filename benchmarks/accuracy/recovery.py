"""Does QAT bring back a network that max calibration broke? ``python -m benchmarks.accuracy.recovery``.

The float network, max-calibrated PTQ, PTQ by our default method, and for each seed: QAT from the broken network, the
same with the float network as a teacher, and the control: the float network fine-tuned as long with that schedule.
Every choice that a run makes is made on the dev split; the test split is scored once per finished checkpoint. A run
whose checkpoint is in the work folder is not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy.results import CIFAR10, FLOAT_CHECKPOINT, Table, require, write_result
from training.checkpoints.checkpoint import SavedCheckpoint, load_checkpoint
from training.loop.fit import fit
from training.loop.schedule import Schedule
from training.predict import predictor
from training.ptq.calibrate import calibrate
from training.qat.distillation import DistillationSettings
from training.qat.fine_tuning import default_schedule, qat
from trtdeploy.data import Dataset, open_dataset
from trtdeploy.errors import TrtDeployError
from trtdeploy.files import atomic_write, sha256_file
from trtdeploy.ledger.evaluation import evaluate, map_labels
from trtdeploy.statistics import compare_paired, wilson_percent

_BEST_PTQ = "relative-mse"
"""What ``calibrate --method all`` chooses on dev."""


class _Progress:
    def __init__(self, name: str) -> None:
        self._name = name

    def step(self, *, epoch: int, epochs: int, step: int, steps: int, loss: float, images_per_s: float) -> None:
        if step % 20 == 0 or step == steps:
            speed = f"{images_per_s:.0f} images/s"
            _say(f"{self._name}: epoch {epoch}/{epochs}, step {step}/{steps}, loss {loss:.3f}, {speed}")

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        _say(f"{self._name}: dev top-1 {metrics['dev_top1']:.2f}%")


class Bench:
    """The runs of this benchmark, each kept in ``work`` as a checkpoint and what it answers on the test split."""

    def __init__(self, dataset: Dataset, start: Path, work: Path) -> None:
        self.dataset = dataset
        self.start = start
        self.work = work
        self.correct: dict[str, NDArray[np.bool_]] = {}
        self.results: dict[str, dict[str, Any]] = {}

    def path(self, name: str) -> Path:
        """Where the checkpoint of a run is."""
        return self.work / f"{name}.safetensors"

    def run(self, name: str, make: Callable[[Path], SavedCheckpoint]) -> None:
        """Make a checkpoint unless it is there, score it once, and remember both."""
        facts_file = self.path(name).with_suffix(".json")
        if not (self.path(name).is_file() and facts_file.is_file()):
            _say(f"{name}: running")
            atomic_write(facts_file, json.dumps(make(self.path(name)).as_json()))
        facts = json.loads(facts_file.read_text())
        self.score(name, self.path(name))
        self.results[name] |= {
            "seconds": facts["seconds"],
            "dev_top1": facts["dev"]["top1"],
            "training": facts["training"],
        }

    def score(self, name: str, checkpoint: Path) -> None:
        """Score a checkpoint on the test split, unless this file was scored before."""
        kept = self.work / f"{name}.test.npz"
        digest = sha256_file(checkpoint)
        known = dict(np.load(kept)) if kept.is_file() else {}
        if str(known.get("sha256")) != digest:
            _say(f"{name}: scoring the test split")
            loaded = load_checkpoint(checkpoint, dataset=self.dataset)
            outputs = evaluate(
                predictor(loaded.model),
                self.dataset.split("test"),
                loaded.facts.preprocessing,
                label_map=map_labels(self.dataset, loaded.facts.labels),
            ).outputs
            known = {"correct": outputs.logits.argmax(axis=1) == outputs.labels, "sha256": np.asarray(digest)}
            with kept.open("wb") as file:
                np.savez(file, **known)
        correct = self.correct[name] = known["correct"].astype(bool)
        top1 = wilson_percent(int(correct.sum()), len(correct))
        self.results[name] = {"sha256": digest, "test_top1": top1.model_dump()}
        _say(f"{name}: test top-1 {top1.format()}")

    def versus(self, candidate: str, reference: str) -> dict[str, Any]:
        """Compare two runs on the same test images."""
        paired = compare_paired(self.correct[reference], self.correct[candidate])
        return {"candidate": candidate, "reference": reference, **paired.model_dump()}


def main() -> None:
    """Run what is missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CIFAR10)
    parser.add_argument("--checkpoint", type=Path, default=FLOAT_CHECKPOINT)
    parser.add_argument("--work", type=Path, default=Path("build/recovery"), help="where finished runs are kept")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    try:
        require(arguments.data, arguments.checkpoint)
        arguments.work.mkdir(parents=True, exist_ok=True)
        with open_dataset(arguments.data) as dataset:
            facts = measure(dataset, arguments.checkpoint, arguments.work, arguments.seeds)
            _say(str(write_result("recovery", facts, tables=[table_of(facts)])))
    except TrtDeployError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)


def measure(dataset: Dataset, start: Path, work: Path, seeds: int) -> dict[str, Any]:
    """Return the facts of the benchmark."""
    bench = Bench(dataset, start, work)
    schedule = default_schedule(dataset)
    bench.score("float", start)
    bench.run("ptq-max", lambda output: calibrate(dataset, _float(bench), output, method="max"))
    bench.run(f"ptq-{_BEST_PTQ}", lambda output: calibrate(dataset, _float(bench), output, method=_BEST_PTQ))
    comparisons = [bench.versus(name, "float") for name in bench.results if name != "float"]
    distillation = DistillationSettings()
    for seed in range(seeds):
        own = schedule.model_copy(update={"seed": seed})
        runs = {
            f"qat-{seed}": lambda output, own=own: _qat(bench, output, own),
            f"control-{seed}": lambda output, own=own: _control(bench, output, own),
            f"qat-teacher-{seed}": lambda output, own=own: _qat(bench, output, own, distillation=distillation),
        }
        for name, make in runs.items():
            bench.run(name, make)
        for name in (f"qat-{seed}", f"qat-teacher-{seed}"):
            comparisons += [bench.versus(name, "float"), bench.versus(name, f"control-{seed}")]
    return {
        "data": {"name": Path(dataset.name).name, "fingerprint": dataset.fingerprint},
        "test_images": len(dataset.split("test")),
        "schedule": schedule.model_dump(mode="json", exclude={"seed"}),
        "distillation": distillation.model_dump(),
        "seeds": list(range(seeds)),
        "runs": bench.results,
        "paired": comparisons,
    }


def table_of(facts: Mapping[str, Any]) -> Table:
    """Return the runs, each beside float and beside its control."""
    paired = {(each["candidate"], each["reference"]): each["difference"] for each in facts["paired"]}

    def beside(name: str, reference: str) -> str:
        found = paired.get((name, reference))
        return "" if found is None else "{value:+.2f} [{low:+.2f}, {high:+.2f}]".format(**found)

    rows = [
        (
            name,
            "{value:.2f} [{low:.2f}, {high:.2f}]".format(**run["test_top1"]),
            beside(name, "float"),
            beside(name, f"control-{name[-1]}"),
            _kept(run.get("training")) if name.startswith("qat") else "",
            f"{run['seconds']:.0f}" if "seconds" in run else "",
        )
        for name, run in facts["runs"].items()
    ]
    return Table(
        "Does QAT bring back a network that max calibration broke?",
        ("run", "test top-1 %", "against float (paired)", "against its control (paired)", "kept", "seconds"),
        tuple(rows),
        f"EfficientNet-B0, CIFAR-10 at 64x64, {facts['test_images']} test images; {len(facts['seeds'])} seed(s), "
        f"{facts['schedule']['max_steps']} steps of {facts['schedule']['batch_size']} images. QAT starts from "
        "ptq-max; a control is the float network fine-tuned equally long. Kept is the better on dev of the start, with "
        "the ranges that learning began with, and the trained state.",
    )


def _kept(training: Mapping[str, Any] | None) -> str:
    if training is None:
        return ""
    return "the start" if training["best_epoch"] == 0 else f"epoch {training['best_epoch']}"


def _float(bench: Bench) -> Any:
    return load_checkpoint(bench.start, dataset=bench.dataset)


def _qat(
    bench: Bench, output: Path, schedule: Schedule, *, distillation: DistillationSettings | None = None
) -> SavedCheckpoint:
    return qat(
        bench.dataset,
        load_checkpoint(bench.path("ptq-max")),
        output,
        schedule=schedule,
        teacher=_float(bench) if distillation else None,
        distillation=distillation or DistillationSettings(),
        observer=_Progress(output.stem),
    )


def _control(bench: Bench, output: Path, schedule: Schedule) -> SavedCheckpoint:
    return fit(bench.dataset, output, schedule=schedule, start=_float(bench), observer=_Progress(output.stem))


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
