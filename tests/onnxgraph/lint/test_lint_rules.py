"""Every rule of the linter: the smallest graph that breaks it, and the one beside it that does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from tests.onnx_graphs import GraphMaker, block_network, save
from trtdeploy.cli.main import app
from trtdeploy.errors import UsageError
from trtdeploy.onnxgraph.lint import RULES, lint, rules_table

Build = Callable[[GraphMaker], object]
ROOT = Path(__file__).parents[3]
REFUSED = {"integer-op", "zero-point", "scale-value", "scale-size"}
"""What the parser of TensorRT-RTX refuses by itself; the rest it takes and runs slower, or as something else."""


def model(build: Build, opset: int = 17) -> onnx.ModelProto:
    g = GraphMaker()
    build(g)
    return g.model({"x": [1, 4, 4, 4]}, {"y": ["a", "b", "c", "d"]}, opset=opset)


def kernel(g: GraphMaker, scale: object = 0.1, axis: int | None = None) -> str:
    return g.qdq(g.constant(np.ones((4, 4, 1, 1), np.float32)), scale, axis=axis)


def conv(tensor: Callable[[GraphMaker], str], weight: Callable[[GraphMaker], str] = kernel) -> Build:
    return lambda g: g.node("Conv", tensor(g), weight(g), output="y")


def x(g: GraphMaker) -> str:
    return g.qdq("x")


def bare(g: GraphMaker) -> str:
    return g.constant(np.ones((4, 4, 1, 1), np.float32))


def run_time(g: GraphMaker) -> str:
    scale, zero = g.node("ReduceMax", "x", keepdims=0), g.constant(np.int8(0))
    return g.node("DequantizeLinear", g.node("QuantizeLinear", "x", scale, zero), scale, zero)


def integers(g: GraphMaker) -> None:
    g.node("MatMulInteger", g.quantize("x", 0.1)[0], g.constant(np.ones((4, 4), np.int8)), output="i")
    g.node("Cast", "i", output="y", to=1)


def three_layers(*floats: int) -> Build:
    """Convolutions in a row, some of them in float."""

    def build(g: GraphMaker) -> None:
        tensor = "x"
        for place in range(3):
            g.quantized = place not in floats
            tensor = g.node("Relu", g.node("Conv", g.qdq(tensor), kernel(g)), output="y" if place == 2 else None)

    return build


def residual(branch: bool) -> Build:
    def build(g: GraphMaker) -> None:
        shortcut = x(g)
        result = g.node("Conv", shortcut, kernel(g))
        g.node("Add", g.qdq(result) if branch else result, shortcut, output="y")

    return build


def bare_residual(g: GraphMaker) -> None:
    g.node("Add", g.node("Conv", x(g), kernel(g)), "x", output="y")


def before_and_behind(middle: Callable[[GraphMaker, str], str]) -> Build:
    """Something between two quantized convolutions."""

    def build(g: GraphMaker) -> None:
        first = g.node("Relu", g.node("Conv", x(g), kernel(g)))
        g.node("Conv", middle(g, first), kernel(g), output="y")

    return build


def gate(quantized: bool) -> Build:
    def middle(g: GraphMaker, tensor: str) -> str:
        gates = g.node("Sigmoid", g.node("Conv", g.qdq(g.node("GlobalAveragePool", g.qdq(tensor))), kernel(g)))
        both = [tensor, gates] if not quantized else [g.qdq(tensor), g.qdq(gates)]
        return g.qdq(g.node("Mul", *both))

    return before_and_behind(middle)


def pooling(quantized: bool) -> Build:
    def middle(g: GraphMaker, tensor: str) -> str:
        return g.qdq(g.node("AveragePool", g.qdq(tensor) if quantized else tensor, kernel_shape=[2, 2]))

    return before_and_behind(middle)


def concat_before(second: Callable[[GraphMaker, str], str], last: float = 0.1) -> Build:
    def build(g: GraphMaker) -> None:
        result = g.node("Concat", g.qdq("x", 0.1), second(g, g.node("Relu", "x")), axis=1)
        wide = g.qdq(g.constant(np.ones((4, 8, 1, 1), np.float32)))
        g.node("Conv", g.qdq(result, last), wide, output="y")

    return build


def norm(behind_layer: bool) -> Build:
    def build(g: GraphMaker) -> None:
        parameters = [g.constant(np.ones(4, np.float32)) for _ in range(4)]
        if behind_layer:
            g.node("BatchNormalization", g.node("Conv", x(g), kernel(g)), *parameters, output="y")
        else:
            g.node("Conv", g.qdq(g.node("BatchNormalization", "x", *parameters)), kernel(g), output="y")

    return build


def unread(g: GraphMaker) -> None:
    g.qdq("x")
    GOOD(g)


def pool_of_codes(g: GraphMaker) -> None:
    codes, parameters, _ = g.quantize("x", 0.03)
    pooled = g.node("MaxPool", codes, kernel_shape=[2, 2])
    g.node("Conv", g.node("DequantizeLinear", pooled, *parameters), kernel(g), output="y")


def branching(g: GraphMaker) -> None:
    bodies = [onnx.parser.parse_graph(f"b () => (float[1,4,4,4] {n}) {{ {n} = {op}(x) }}") for n, op in NAMES_AND_OPS]
    chosen = g.node("If", g.constant(np.array(True)), then_branch=bodies[0], else_branch=bodies[1])
    g.node("Conv", g.qdq(chosen), kernel(g), output="y")


NAMES_AND_OPS = (("o", "Identity"), ("p", "Relu"))


def activation(between: bool) -> Build:
    def build(g: GraphMaker) -> None:
        result = g.node("Conv", x(g), kernel(g))
        active = g.node("Relu", g.qdq(result) if between else result)
        g.node("Conv", g.qdq(active), kernel(g), output="y")

    return build


def concat(second: float) -> Build:
    return lambda g: g.node("Concat", g.qdq("x", 0.1), g.qdq(g.node("Relu", "x"), second), axis=1, output="y")


def with_bias(amax: float) -> Build:
    """A convolution with a bias of 1 and a channel whose scale is that of the amax, or of 1e-8 for 0."""

    def build(g: GraphMaker) -> None:
        scale = np.array([0.1, 0.1, max(amax, 1e-8) / 127, 0.1])
        g.node("Conv", x(g), kernel(g, scale, 0), g.constant(np.ones(4, np.float32)), output="y")

    return build


def transposed(scale: object, axis: int | None) -> Build:
    return lambda g: g.node("ConvTranspose", x(g), kernel(g, scale, axis), output="y")


GOOD = conv(x)
CASES: dict[str, tuple[onnx.ModelProto, onnx.ModelProto]] = {
    "integer-op": (model(integers), model(GOOD)),
    "opset": (model(conv(x, lambda g: kernel(g, np.full(4, 0.1), 0)), 12), model(GOOD, 13)),
    "zero-point": (model(conv(lambda g: g.qdq("x", zero=3))), model(GOOD)),
    "code-type": (model(conv(lambda g: g.qdq("x", dtype="uint8"))), model(GOOD)),
    "run-time-scale": (model(conv(run_time)), model(GOOD)),
    "scale-value": (model(conv(lambda g: g.qdq("x", 0.0))), model(conv(lambda g: g.qdq("x", 1e-10)))),
    "activation-per-channel": (model(conv(lambda g: g.qdq("x", np.full(4, 0.1), axis=1))), model(GOOD)),
    "weight-axis": tuple(model(conv(x, lambda g, a=a: kernel(g, np.full(4, 0.1), a))) for a in (1, 0)),  # type: ignore[dict-item]
    "scale-size": tuple(model(conv(x, lambda g, n=n: kernel(g, np.full(n, 0.1), 0))) for n in (3, 4)),  # type: ignore[dict-item]
    "weight-in-float": (model(conv(x, bare)), model(GOOD)),
    "input-in-float": (model(conv(lambda _: "x")), model(GOOD)),
    "layer-in-float": (model(three_layers(1)), model(three_layers(0, 2))),
    "both-residual-inputs": (model(residual(True)), model(residual(False))),
    "before-activation": (model(activation(True)), model(activation(False))),
    "concat-scales": (model(concat(0.2)), model(concat(0.1))),
    "double-pair": (model(conv(lambda g: g.qdq(g.qdq("x")))), model(GOOD)),
    "output-pair": (model(lambda g: g.qdq(g.node("Conv", x(g), kernel(g)), output="y")), model(GOOD)),
    "not-quantized": (model(conv(lambda _: "x", bare)), model(GOOD)),
    "residual-in-float": (model(bare_residual), model(residual(False))),
    "gate-in-float": (model(gate(False)), model(gate(True))),
    "pooling-in-float": (model(pooling(False)), model(pooling(True))),
    "concat-in-float": (
        model(concat_before(lambda _, tensor: tensor)),
        model(concat_before(lambda g, tensor: g.qdq(tensor, 0.1))),
    ),
    "unfused-bn": (model(norm(False)), model(norm(True))),
    "unused-pair": (model(unread), model(GOOD)),
    "codes-read": (model(pool_of_codes), model(GOOD)),
    "old-opset": (model(GOOD, 12), model(GOOD, 13)),
    "subgraph": (model(branching), model(GOOD)),
    "bias-overflow": (model(with_bias(0.0)), model(with_bias(1.0))),
    "transposed-axis": (model(transposed(np.full(4, 0.1), 0)), model(transposed(0.1, None))),
}


def test_every_rule_has_both_graphs_and_a_number_of_its_own() -> None:
    assert list(CASES) == list(RULES)
    assert [rule.id for rule in RULES.values()] == [f"Q{number:03}" for number in range(1, len(RULES) + 1)]


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_is_found_in_its_graph_and_not_in_the_one_beside_it(rule: str) -> None:
    failing, passing = CASES[rule]
    assert {finding.rule for finding in lint(failing)} == {rule}
    assert lint(failing, ignore=[rule]) == lint(failing, ignore=[RULES[rule].id]) == []
    assert lint(passing) == []


@pytest.mark.parametrize("rule", CASES)
def test_the_parser_of_tensorrt_rtx_refuses_what_is_recorded_and_no_more(rule: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)

    def parses(model: onnx.ModelProto) -> bool:
        network = builder.create_network(0)
        return bool(trt.OnnxParser(network, logger).parse(model.SerializeToString()))

    failing, passing = CASES[rule]
    assert parses(failing) == (rule not in REFUSED)
    assert parses(passing)


def test_a_network_has_only_what_is_wrong_with_it() -> None:
    assert {finding.rule for finding in lint(block_network())} == {
        *("both-residual-inputs", "gate-in-float", "pooling-in-float"),
    }


def test_the_scale_before_the_reader_of_a_concat_counts() -> None:
    [finding] = lint(model(concat_before(lambda g, tensor: g.qdq(tensor, 0.1), last=0.2)))
    assert finding.rule == "concat-scales"


def test_a_branch_alone_with_qdq_is_wrong_twice() -> None:
    def build(g: GraphMaker) -> None:
        g.node("Add", g.qdq(g.node("Conv", x(g), kernel(g))), "x", output="y")

    assert {finding.rule for finding in lint(model(build))} == {"residual-in-float", "both-residual-inputs"}


def test_the_page_has_the_rules_of_the_code() -> None:
    assert rules_table() in (ROOT / "docs" / "lint.md").read_text(encoding="utf-8")


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(UsageError, match="Q999"):
        lint(CASES["opset"][0], ignore=["Q999"])


def test_the_command_says_what_where_and_what_to_do(tmp_path: Path) -> None:
    failing, passing = (save(m, tmp_path / f"{i}.onnx") for i, m in enumerate(CASES["both-residual-inputs"]))
    done = CliRunner().invoke(app, ["lint", str(failing)])
    assert done.exit_code == 1
    assert "Q013 warning" in done.stdout
    assert RULES["both-residual-inputs"].remedy in done.stdout
    assert CliRunner().invoke(app, ["lint", str(failing), "--ignore", "Q013"]).exit_code == 0
    assert '"id": "Q013"' in CliRunner().invoke(app, ["lint", str(failing), "--json"]).stdout
    assert CliRunner().invoke(app, ["lint", str(passing)]).exit_code == 0
    assert CliRunner().invoke(app, ["lint", str(tmp_path)]).exit_code == 2
