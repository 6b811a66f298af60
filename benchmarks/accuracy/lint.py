"""The linter on our own exports, on planted faults, and its repairs of what ONNX Runtime's quantizer writes.

Random weights: what the linter finds does not depend on them. The answers are compared on noise.

    python -m benchmarks.accuracy.lint
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime.quantization as ort_quantization
import torch
from torch import Tensor, nn

from benchmarks.accuracy.results import PROJECT, RESULTS, Table, write_result
from benchmarks.accuracy.small_networks import thin_densenet, thin_resnet
from training.models.efficientnet import efficientnet_b0
from training.onnx_export import trace_to_onnx
from training.ptq.ranges import fix_ranges, observing_inputs
from training.quantization import quantize
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.calibration import AbsHistogram
from trtdeploy.errors import RuntimeUnavailableError, TrtDeployError
from trtdeploy.onnxgraph.lint import RULES, Finding, lint
from trtdeploy.onnxgraph.lint.fix import fix
from trtdeploy.quantizing import PtqOptions
from trtdeploy.quantizing import quantize as quantize_onnx
from trtdeploy.runtimes.onnxruntime.witness import Witness
from trtdeploy.statistics import sqnr_db
from trtdeploy.tensors import Array

NAME = "lint"
RULE_TESTS = PROJECT / "tests" / "integration" / "test_lint_rules.py"
QUANTIZERS: dict[str, dict[str, Any]] = {
    "Q/DQ": {},
    "Q/DQ per channel": {"per_channel": True},
    "Q/DQ uint8": {"activation_type": ort_quantization.QuantType.QUInt8},
    "QOperator": {"quant_format": ort_quantization.QuantFormat.QOperator},
    "QOperator uint8": {
        "quant_format": ort_quantization.QuantFormat.QOperator,
        "activation_type": ort_quantization.QuantType.QUInt8,
    },
}
"""ONNX Runtime's quantize_static with all its defaults but these; uint8 was its default for years."""


class Mixed(nn.Module):
    """Every kind of layer that has a rule: BN, ReLU, residual add, concat, both poolings, gate, linear."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
        )
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.left = nn.Sequential(nn.Conv2d(16, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(16, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20), nn.ReLU())
        self.after = nn.Sequential(nn.Conv2d(32, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24 * 8 * 8, classes))

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.stem(inputs)
        features = torch.relu(features + self.block(features))
        features = features * self.gate(features)
        both = torch.cat([self.left(features), self.right(features)], 1)
        result: Tensor = self.head(self.after(both))
        return result


@dataclass(frozen=True)
class Subject:
    """A network that goes through the linter, and the edge of its images."""

    name: str
    make: Callable[[int], nn.Module]
    size: int


SUBJECTS = (
    Subject("mixed", Mixed, 32),
    Subject("thin ResNet", thin_resnet, 32),
    Subject("thin DenseNet", thin_densenet, 32),
    Subject("EfficientNet-B0", efficientnet_b0, 224),
)


@dataclass(frozen=True)
class Files:
    """What is made of one network, and the noise that it was calibrated with."""

    float_onnx: Path
    exports: dict[str, Path]
    noise: Array


class _Reader(ort_quantization.CalibrationDataReader):  # type: ignore[misc]  # no types
    def __init__(self, noise: Array) -> None:
        self._left = iter(noise[:, None])

    def get_next(self) -> dict[str, Array] | None:
        sample = next(self._left, None)
        return None if sample is None else {"input": sample}


def with_plain_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give every reader of a shared constant its initializer: ONNX Runtime's QOperator format fails on an Identity."""
    constants = {tensor.name for tensor in model.graph.initializer}
    source: dict[str, str] = {}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Identity" and source.get(node.input[0], node.input[0]) in constants:
            source[node.output[0]] = source.get(node.input[0], node.input[0])
            continue
        for position, read in enumerate(node.input):
            node.input[position] = source.get(read, read)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def export(subject: Subject, folder: Path) -> Files:
    """Write the float model and what ``training export`` and ``trtdeploy quantize`` make of it."""
    torch.manual_seed(0)
    network = subject.make(10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # some start at 0, which makes a residual branch dead
    noise = torch.randn(8, 3, subject.size, subject.size)
    with torch.no_grad():
        for _ in range(3):
            network.train()(noise)
    network.eval()
    float_onnx, trained, ptq = folder / "float.onnx", folder / "trained.onnx", folder / "ptq.onnx"
    onnx.save(with_plain_constants(onnx.load_from_string(trace_to_onnx(network, noise[:1], opset=17))), float_onnx)
    np.save(folder / "noise.npy", noise.numpy())
    quantize_onnx(float_onnx, ptq, str(folder / "noise.npy"), PtqOptions(method="max"))
    quantized = quantize(network, example=noise[:1])
    with observing_inputs(quantized, AbsHistogram) as histograms, torch.no_grad():
        quantized(noise)
    fix_ranges(quantized, histograms)
    trained.write_bytes(trace_to_onnx(quantized, noise[:1], opset=17))
    sys.stderr.write("  exported\n")
    return Files(float_onnx, {"training export": trained, "trtdeploy quantize": ptq}, noise.numpy())


def tensorrt_rtx(path: Path, size: int) -> str:
    """Return "built", or at which point TensorRT-RTX refused the model and why."""
    shape = (1, 3, size, size)
    config = BuildConfig.model_validate(
        {"runtime": "tensorrt-rtx", "profiles": [{"input": {"min": shape, "opt": shape, "max": shape}}]}
    )
    try:
        build(path, path.with_suffix(".rtx"), config)
    except RuntimeUnavailableError as error:
        return f"not asked: {error.message}"
    except TrtDeployError as error:
        return f"refused: {error.message}"
    return "built"


def counts(findings: list[Finding]) -> dict[str, int]:
    """Return how often each rule was broken."""
    return dict(Counter(f"{finding.id} {finding.rule}" for finding in findings))


def answers(path: Path, noise: Array) -> Array:
    """Run a model, exactly as it is written, on all the noise."""
    run = Witness(path.read_bytes())
    return np.concatenate([run({"input": sample[None]})[0] for sample in noise])


def repair(subject: Subject, files: Files, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Let ONNX Runtime quantize, repair the result, and compare answers."""
    asymmetric, repaired = files.float_onnx.with_name("ort.onnx"), files.float_onnx.with_name("repaired.onnx")
    ort_quantization.quantize_static(files.float_onnx, asymmetric, _Reader(files.noise), **options)
    before = onnx.load(asymmetric)
    done = fix(before)
    fixed = done.model
    onnx.checker.check_model(fixed, full_check=True)
    onnx.save(fixed, repaired)
    unseen = np.random.default_rng(1).standard_normal(files.noise.shape).astype(np.float32)
    floats, old, new = (answers(path, unseen) for path in (files.float_onnx, asymmetric, repaired))
    return {
        "network": subject.name,
        "quantizer": name,
        "findings_before": counts(lint(before)),
        "repairs": dict(Counter(repair.rule for repair in done.repairs)),
        "findings_after": counts(lint(fixed)),
        "tensorrt_rtx": tensorrt_rtx(repaired, subject.size),
        "sqnr_db": {
            "ort_against_float": round(sqnr_db(floats, old), 2),
            "repaired_against_float": round(sqnr_db(floats, new), 2),
            "repaired_against_ort": round(sqnr_db(old, new), 2),
        },
    }


def planted_faults() -> dict[str, Any]:
    """Run the tests of the rule graphs: each rule's failing graph, its passing one, and TensorRT-RTX's opinion."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", RULE_TESTS]
        subprocess.run(list(map(str, command)), cwd=PROJECT, check=False, stdout=sys.stderr)
        cases = list(xml.etree.ElementTree.parse(report).getroot().iter("testcase"))
    failed = [str(case.get("name")) for case in cases if case.find("failure") is not None]
    failed += [str(case.get("name")) for case in cases if case.find("error") is not None]
    found = [
        name
        for name in RULES
        if any(f"found_in_its_graph_and_not_in_the_one_beside_it[{name}]" in _name(c) for c in cases)
    ]
    return {"rules": len(RULES), "found": len(found), "tests": len(cases), "failed": failed}


def _name(case: Any) -> str:
    is_bad = any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
    return "" if is_bad else str(case.get("name"))


def measure() -> Iterator[dict[str, Any]]:
    """Yield the facts of every network."""
    for subject in SUBJECTS:
        with tempfile.TemporaryDirectory() as name:
            sys.stderr.write(f"{subject.name}\n")
            files = export(subject, Path(name))
            exports = {
                export: {
                    "findings": [f"{f.id} {f.node}: {f.reason}" for f in lint(onnx.load(path))],
                    "tensorrt_rtx": tensorrt_rtx(path, subject.size),
                }
                for export, path in files.exports.items()
            }
            sys.stderr.write("  repairing\n")
            repairs = [repair(subject, files, *quantizer) for quantizer in QUANTIZERS.items()]
            yield {"network": subject.name, "exports": exports, "repairs": repairs}


def _total(findings: dict[str, int]) -> str:
    return str(sum(findings.values()))


def tables(networks: list[dict[str, Any]], faults: dict[str, Any]) -> list[Table]:
    """Return what a reader sees."""
    exports = tuple(
        (network["network"], name, str(len(facts["findings"])), facts["tensorrt_rtx"])
        for network in networks
        for name, facts in network["exports"].items()
    )
    repaired = tuple(
        (
            each["network"],
            each["quantizer"],
            _total(each["findings_before"]),
            _total(each["findings_after"]),
            each["tensorrt_rtx"],
            *(f"{each['sqnr_db'][key]:.1f}" for key in ("ort_against_float", "repaired_against_float")),
        )
        for network in networks
        for each in network["repairs"]
    )
    return [
        Table(
            "The linter on our exports",
            ("network", "made by", "findings", "TensorRT-RTX"),
            exports,
            note=f"{faults['found']} of {faults['rules']} rules find the fault planted in their graph and are silent "
            "on the graph beside it.",
        ),
        Table(
            "lint --fix on the output of ONNX Runtime's own quantizer",
            ("network", "format", "findings", "after --fix", "TensorRT-RTX", "SQNR before dB", "SQNR after dB"),
            repaired,
            note="Random weights, 8 images of noise to calibrate, 8 others to compare: signal to quantization noise "
            "of the logits against the float model.",
        ),
    ]


def main() -> int:
    """Run the benchmark; exit code 1 if an export has findings, a fault is not found or a repair is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    logging.getLogger().setLevel(logging.ERROR)  # ONNX Runtime's advice on its own quantizer
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder for the JSON.")
    arguments = parser.parse_args()
    faults = planted_faults()
    networks = list(measure())
    facts = {"planted_faults": faults, "networks": networks}
    path = write_result(NAME, facts, tables=tables(networks, faults), folder=arguments.results)
    sys.stdout.write(f"{path}\n")
    clean = not any(facts["findings"] for network in networks for facts in network["exports"].values())
    taken = all(
        each["tensorrt_rtx"] == "built" or each["findings_after"] for network in networks for each in network["repairs"]
    )
    return int(not (clean and taken and not faults["failed"] and faults["found"] == faults["rules"]))


if __name__ == "__main__":
    sys.exit(main())
