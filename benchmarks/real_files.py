"""lint, quantize, build and inspect on ONNX files that were not made for trtdeploy: those that wheels ship.

    pip download --no-deps --dest wheels rapidocr-onnxruntime silero-vad magika
    for wheel in wheels/*.whl; do unzip -q -o "$wheel" -d wheels; done
    python -m benchmarks.real_files --models wheels

The wheels are read, not installed. Commands run as a user runs them, on samples that this file makes: lines of text,
tones, bytes. A file that is not known here gets none. Writes ``benchmarks/results/real_files.json`` and
``docs/real-files.md``; exit code 1 if a command ended by a fault of its own, or with an error that says nothing to do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.accuracy.results import PROJECT, Table, write_result
from benchmarks.accuracy.tables import section
from trtdeploy.files import atomic_write
from trtdeploy.tensors import Array

NAME = "real_files"
RESULTS = PROJECT / "benchmarks" / "results"
SAMPLES = 8
RATE_HZ = 16000
_TRTDEPLOY = [sys.executable, "-m", "trtdeploy"]
_TIMEOUT_S = 600
_INTRODUCTION = """# Real files

What the commands make of ONNX files that wheels of the registry ship, with samples that the benchmark makes (lines of
text, tones, bytes). Rendered from the JSON that one command wrote; nothing here is typed in. Where the files come from:

```text
pip download --no-deps --dest wheels rapidocr-onnxruntime silero-vad magika
for wheel in wheels/*.whl; do unzip -q -o "$wheel" -d wheels; done
python -m benchmarks.real_files --models wheels
```
"""


@dataclass(frozen=True)
class Kind:
    """What is known of a file: how samples of it are made, and the inputs that are the same for all.

    Attributes:
        ends: How its name ends.
        sample: Makes sample number ``n`` as arrays by input.
        fixed: ``NAME=VALUE``.
        is_step: The model has a state, and is run for one sample at a time.
    """

    ends: str
    sample: Callable[[int], dict[str, Array]]
    fixed: tuple[str, ...] = ()
    is_step: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: Its exit code.
        facts: What ``--json`` printed; empty on an error.
        words: The error and what to do about it; empty on success.
    """

    code: int
    facts: Any
    words: str


def text(width: int, height: int, mean: float, deviation: float) -> Callable[[int], dict[str, Array]]:
    """Return what makes a normalised image with lines of black text on white."""

    def sample(number: int) -> dict[str, Array]:
        rng = np.random.default_rng(number)
        page = Image.new("RGB", (width, height), "white")
        for line in range(max(1, height // 24)):
            words = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz 0123456789"), width // 8))
            ImageDraw.Draw(page).text((4, 4 + 24 * line), words, fill="black")
        pixels = np.asarray(page, np.float32).transpose(2, 0, 1)[None] / 255
        return {"x": ((pixels - mean) / deviation).astype(np.float32)}

    return sample


def tone(number: int) -> dict[str, Array]:
    """Return 32 ms of a tone with harmonics and a little noise, one window of a voice detector."""
    time_s = np.arange(512) / RATE_HZ
    harmonics = sum(np.sin(2 * np.pi * (110 + 30 * number) * k * time_s) / k for k in range(1, 6))
    noise = np.random.default_rng(number).normal(0, 0.01, 512)
    return {"input": (0.2 * harmonics + noise).astype(np.float32)[None]}


def file_bytes(number: int) -> dict[str, Array]:
    """Return the first and last 1024 bytes of one of our own source files, as a detector of file types takes them."""
    sources = sorted((PROJECT / "trtdeploy").glob("*.py"))
    content = np.frombuffer(sources[number % len(sources)].read_bytes(), np.uint8).astype(np.int32)
    padded = [np.pad(part, (0, 1024 - len(part)), constant_values=256) for part in (content[:1024], content[-1024:])]
    return {"bytes": np.concatenate(padded)[None]}


KINDS = (
    Kind("det_infer.onnx", text(320, 320, 0.45, 0.23)),
    Kind("rec_infer.onnx", text(320, 48, 0.5, 0.5)),
    Kind("cls_infer.onnx", text(192, 48, 0.5, 0.5)),
    Kind("silero_vad.onnx", tone, ("sr=16000", "state=0"), is_step=True),
    Kind("silero_vad_op18_ifless.onnx", tone, ("sr=16000", "state=0"), is_step=True),
    Kind("silero_vad_16k_op15.onnx", tone, ("sr=16000", "state=0"), is_step=True),
    Kind("silero_vad_half.onnx", tone, ("state=0",), is_step=True),
    Kind("standard_v3_3/model.onnx", file_bytes),
)


def run(*arguments: str | Path) -> Outcome:
    """Run a command of trtdeploy as a user does."""
    done = subprocess.run(
        [*_TRTDEPLOY, *map(str, arguments), "--json"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith(("WARNING", "  | "))]
    words = " ".join(lines).strip() if done.returncode not in (0, 1) else ""
    facts = json.loads(done.stdout) if done.stdout.strip() and not words else {}
    return Outcome(done.returncode, facts, words)


def measure(model: Path, folder: Path) -> dict[str, Outcome]:
    """Run every command on one file, with samples where its kind is known."""
    kind = next((each for each in KINDS if str(model).endswith(each.ends)), None)
    given: list[str | Path] = []
    if kind is not None:
        data = folder / "samples"
        data.mkdir()
        for number in range(SAMPLES):
            np.savez(data / f"{number}.npz", **kind.sample(number))  # type: ignore[arg-type]
        given = ["--data", data, *(word for each in kind.fixed for word in ("--fixed", each))]
    quantized, plan = folder / "int8.onnx", folder / "m.plan"
    outcomes = {"lint": run("lint", model), "inspect": run("inspect", model)}
    if kind is not None:
        one = ("--batch", "1") if kind.is_step else ()
        outcomes["quantize"] = run("quantize", model, "-o", quantized, *given, "--method", "max", *one)
    for runtime in ("onnxruntime", "tensorrt-rtx"):
        rounds = ("--timing-rounds", "5") if runtime == "onnxruntime" else ()
        outcomes[f"build {runtime}"] = run("build", model, "-o", plan, "--runtime", runtime, *rounds, *given)
        if quantized.exists():
            outcomes[f"build INT8 {runtime}"] = run(
                "build", quantized, "-o", plan, "--runtime", runtime, *rounds, *given
            )
    return outcomes


def cell(name: str, outcomes: dict[str, Outcome]) -> str:
    """Return what a reader sees of one command."""
    outcome = outcomes.get(name)
    if outcome is None:
        return ""
    if outcome.words:
        return f"{outcome.code}: {outcome.words}".replace("|", "\\|")
    facts = outcome.facts
    if name == "lint":
        return ", ".join(sorted({finding["rule"] for finding in facts})) or "clean"
    if name == "quantize":
        return f"{facts['quantized_layers']} of {facts['layers']} layers, {facts['output_sqnr_db']:.1f} dB"
    if name.startswith("build"):
        tactic = facts["tactic"]
        if tactic is not None:
            best = min(tactic["milliseconds"].values())
            shapes = ", ".join(
                f"{key} {'x'.join(map(str, shape)) or 'value'}" for key, shape in tactic["shapes"].items()
            )
            return f"{best:.2f} ms on {shapes}"
        return f"{facts['plan_bytes'] / 1e6:.1f} MB"
    return "ok"


def is_right(outcome: Outcome) -> bool:
    """Say whether a command did its work, or ended with an error of the input that says what to do."""
    return outcome.code in (0, 1) or (outcome.code == 2 and outcome.words.startswith("error: "))


COLUMNS = (
    *("lint", "inspect", "quantize", "build onnxruntime", "build INT8 onnxruntime"),
    *("build tensorrt-rtx", "build INT8 tensorrt-rtx"),
)


def tables(measured: dict[str, dict[str, Outcome]]) -> Iterator[Table]:
    """Yield the table of what worked, and the words of what did not."""
    rows = tuple(
        (name, *(cell(column, outcomes) if not _words(outcomes, column) else "error" for column in COLUMNS))
        for name, outcomes in measured.items()
    )
    yield Table(
        "Every command on every file",
        ("file", *COLUMNS),
        rows,
        note="Quantized by --method max. Errors are in the table below.",
    )
    words = tuple(
        (name, column, cell(column, outcomes))
        for name, outcomes in measured.items()
        for column in COLUMNS
        if _words(outcomes, column)
    )
    if words:
        yield Table("Errors: the exit code, and what is printed", ("file", "command", "words"), words)


def _words(outcomes: dict[str, Outcome], column: str) -> str:
    return outcomes[column].words if column in outcomes else ""


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="Files, or folders of unpacked wheels.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder for the JSON.")
    parser.add_argument("--output", type=Path, default=PROJECT / "docs" / "real-files.md", help="The page.")
    arguments = parser.parse_args()
    files = [file for path in arguments.models for file in (sorted(path.rglob("*.onnx")) if path.is_dir() else [path])]
    measured: dict[str, dict[str, Outcome]] = {}
    for file in files:
        sys.stderr.write(f"{file}\n")
        with tempfile.TemporaryDirectory() as folder:
            outcomes = measure(file, Path(folder))
        hidden = {"/".join(file.parts[-3:]): file.name, folder: "FOLDER", str(file): file.name}
        measured["/".join(file.parts[-2:])] = {
            name: Outcome(each.code, each.facts, _without(each.words, hidden)) for name, each in outcomes.items()
        }
    facts = {
        "files": {
            name: {command: {"code": each.code, "words": each.words} for command, each in outcomes.items()}
            for name, outcomes in measured.items()
        }
    }
    path = write_result(NAME, facts, tables=list(tables(measured)), folder=arguments.results)
    page = "\n".join([_INTRODUCTION, *section(json.loads(path.read_text()), "benchmarks")])
    atomic_write(arguments.output, page)
    sys.stdout.write(f"{path}\n{arguments.output}\n")
    return int(not all(is_right(each) for outcomes in measured.values() for each in outcomes.values()))


def _without(words: str, hidden: dict[str, str]) -> str:
    for name, shown in sorted(hidden.items(), key=lambda item: -len(item[0])):
        words = words.replace(name, shown)
    return words


if __name__ == "__main__":
    sys.exit(main())
