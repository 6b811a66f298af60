"""The road from a float ONNX file to a validated plan, in one process, for a processor that an emulator stands for.

Run by ``test_emulated_processor.py`` as ``qemu-x86_64 -cpu Haswell python emulated_processor.py FOLDER``: it works in
that folder and prints one JSON document of what it has measured. Torch is left out: its import alone takes a minute
there, and so are child processes, which an emulator of one process does not emulate.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from PIL import Image
from typer.testing import CliRunner

from tests.onnx_graphs import GraphMaker, save
from tests.runtimes.onnxruntime.int8_arithmetic import answers_in_int8
from trtdeploy.cli.main import app
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.engine import Engine
from trtdeploy.runtimes.onnxruntime.building.integer_sums import exact_products
from trtdeploy.runtimes.onnxruntime.building.tactics import tactics_for
from trtdeploy.runtimes.onnxruntime.cpu import instruction_sets, processor_name
from trtdeploy.runtimes.onnxruntime.session import make_session
from trtdeploy.tensors import Array

SIDE, PATCH, CHANNELS = 9, 3, 16
CLASSES = ("dark", "light", "striped", "dotted")
PER_CLASS = {"train": 10, "test": 6}


def classifier(samples: Array) -> onnx.ModelProto:
    """Convolution of 3x3 patches side by side, ReLU, Gemm: weights mostly of one sign, so that sums are large.

    The logits are 0 on the average of the samples, so that a small error changes the answer to some.
    """
    rng = np.random.default_rng(3)
    g = GraphMaker()
    kernels = (rng.uniform(-0.3, 1, (CHANNELS, 3, PATCH, PATCH)) / 20).astype(np.float32)
    convolved = g.node(
        "Conv",
        "input",
        g.constant(kernels, "kernels"),
        g.constant(rng.standard_normal(CHANNELS).astype(np.float32) / 10, "shift"),
        kernel_shape=[PATCH, PATCH],
        strides=[PATCH, PATCH],
    )
    flat = g.node("Flatten", g.node("Relu", convolved))
    weights = rng.uniform(-0.6, 1, (len(CLASSES), CHANNELS * (SIDE // PATCH) ** 2)).astype(np.float32)
    product = g.node("Gemm", flat, g.constant(weights, "weights"), transB=1)
    g.node("Add", product, g.constant(np.zeros(len(CLASSES), np.float32), "bias"), output="logits")
    model = g.model(
        {"input": ["batch", 3, SIDE, SIDE]},
        {"logits": ["batch", len(CLASSES)]},
        metadata={
            "trtdeploy.preprocessing": Preprocessing.square(SIDE).to_json(),
            "trtdeploy.labels": json.dumps(list(CLASSES)),
        },
    )
    bias = -answers_in_int8(model, {"input": samples}).mean(axis=0).astype(np.float32)
    next(each for each in model.graph.initializer if each.name == "bias").CopyFrom(
        numpy_helper.from_array(bias, "bias")
    )
    return model


def sequence() -> onnx.ModelProto:
    """Two products of (batch, 5, 32) as a transformer has them, with Q/DQ; unsigned activations, all codes large."""
    rng = np.random.default_rng(4)
    g = GraphMaker()

    def product(tensor: str, amax: float, output: str) -> str:
        values = rng.uniform(0.3, 1, (32, 32)).astype(np.float32)
        weight = g.qdq(g.constant(values), values.max(axis=0) / 127, axis=1)
        return g.node("MatMul", g.qdq(tensor, amax / 255, dtype="uint8"), weight, output=output)

    hidden = product("x", 1, "first")
    product(g.node("Mul", hidden, g.constant(np.float32(1 / 32))), 1, "y")
    return g.model({"x": ["batch", 5, 32]}, {"y": ["batch", 5, 32]})


def draw_images(folder: Path) -> None:
    rng = np.random.default_rng(5)
    rows = np.arange(SIDE)[:, None, None]
    for index, name in enumerate(CLASSES):
        for split, count in PER_CLASS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                base = [90, 250, 150 + 90 * (rows % 2), 200 + 50 * (rows % 3)][index]
                pixels = np.clip(base + rng.integers(-90, 60, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")


def command(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if done.exit_code:
        raise SystemExit(
            f"trtdeploy {' '.join(map(str, arguments))}: {done.exit_code}\n{done.output}\n{done.exception!r}"
        )
    found = re.search(r"\{.*\}", done.output, re.DOTALL)
    return json.loads(found[0]) if found else {"said": done.output}


def difference(answered: Array, expected: Array) -> float:
    return float(np.linalg.norm(answered - expected) / np.linalg.norm(expected))


def with_all_optimizations(model: Path, inputs: dict[str, Array]) -> Array:
    """What anybody's session computes: with the fused kernels of this processor."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    outputs: list[Array] = session.run(None, inputs)
    return outputs[0]


def measured(model: Path, inputs: dict[str, Array]) -> dict[str, Any]:
    """Build a plan, and hold it, every tactic and a plain session against integer arithmetic."""
    quantized = onnx.load(model)
    expected = answers_in_int8(quantized, inputs)
    plan = model.with_suffix(".plan")
    command("build", model, "-o", plan, "--timing-rounds", 1, "--threads", 1)
    manifest = json.loads(Path(f"{plan}.json").read_text())
    with Engine.load(plan) as engine:
        [answered] = engine.infer(inputs).values()
    tactics = {}
    for tactic in tactics_for(True):
        content = tactic.compile(quantized)
        if content is not None:
            kernels = sorted({node.op_type for node in onnx.load_model_from_string(content).graph.node})
            [output] = make_session(content).run(None, inputs)
            tactics[tactic.name] = {"error": difference(output, expected), "kernels": kernels}
    return {
        "plan_error": difference(answered, expected),
        "plan_capability": manifest["device"]["capability"],
        "rejected": manifest["tactic"]["rejected"],
        "tactics": tactics,
        "plain_session_error": difference(with_all_optimizations(model, inputs), expected),
    }


def asymmetric(quantized: onnx.ModelProto) -> onnx.ModelProto:
    """The same model as another quantizer writes it: zero-points of activations that are not zero."""
    changed = onnx.ModelProto()
    changed.CopyFrom(quantized)
    zero = {tensor.name: tensor for tensor in changed.graph.initializer}
    weights = {"kernels", "weights"}
    for node in changed.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in weights:
            zero[node.input[2]].CopyFrom(numpy_helper.from_array(np.int8(1), node.input[2]))
    return changed


def quantized(source: Path, target: str, samples: Array) -> dict[str, Any]:
    """Quantize for a target's placement; return what is printed, and what integer arithmetic says of the file."""
    written = source.with_name(f"{target}.onnx")
    given = save_samples(source.parent, samples)
    said = command(
        *("quantize", source, "-o", written, "--data", given, "--batch", len(samples)),
        *("--target", target, "--method", "max", "--json"),
    )
    batch = {"input": samples}
    exact, of_float = (answers_in_int8(onnx.load(each), batch) for each in (written, source))
    return {
        "printed_db": said["output_sqnr_db"],
        "integer_db": float(10 * np.log10(np.square(of_float).sum() / np.square(exact - of_float).sum())),
        **measured(written, batch),
    }


def save_samples(folder: Path, samples: Array) -> Path:
    np.save(folder / "samples.npy", samples)
    return folder / "samples.npy"


def main(folder: Path) -> dict[str, Any]:
    draw_images(folder / "images")
    files = sorted((folder / "images" / "train").glob("*/*.png"))
    samples = Preprocessing.square(SIDE)([Image.open(file) for file in files])
    source = save(classifier(samples), folder / "float.onnx")
    rows = np.random.default_rng(6).uniform(0.6, 1, (3, 5, 32)).astype(np.float32)
    found: dict[str, Any] = {
        "processor": processor_name(),
        "instruction_sets": instruction_sets(),
        "exact_products": sorted(exact_products()),
        "networks": {
            "for TensorRT": quantized(source, "tensorrt", samples),
            "for ONNX Runtime": quantized(source, "onnxruntime", samples),
            "sequence": measured(save(sequence(), folder / "sequence.onnx"), {"x": rows}),
        },
    }
    other = save(asymmetric(onnx.load(folder / "tensorrt.onnx")), folder / "asymmetric.onnx")
    fixed = folder / "fixed.onnx"
    found["lint"] = command("lint", other, "--fix", fixed)["said"]
    exact = [answers_in_int8(onnx.load(each), {"input": samples}) for each in (other, fixed)]
    found["lint_moves"] = difference(exact[1], exact[0])
    what = ("--plan", folder / "onnxruntime.plan", "--reference", folder / "onnxruntime.onnx")
    found["validate"] = command("validate", *what, "--data", folder / "images", "--json")
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))  # noqa: T201
