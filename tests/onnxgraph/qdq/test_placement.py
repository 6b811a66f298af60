from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from trtdeploy.onnxgraph.qdq.placement import wanted_sites

CASES = {
    "residual": ("a = Conv(x, w) \n b = BatchNormalization(a, c, c, c, c) \n y = Add(b, x)", {("y", 1, "residual")}),
    "shortcut": (
        "a = Conv(x, w) \n r = Relu(a) \n b = Conv(r, w) \n s = Conv(x, w) \n y = Add(b, s)",
        {("y", 1, "residual")},
    ),
    "a bias that is computed from constants": (
        "a = Conv(x, w) \n s = Constant<value_ints=[1, 4, 1, 1]>() \n r = Reshape(c, s) \n y = Add(a, r)",
        set(),
    ),
    "add of no convolution": ("a = Relu(x) \n y = Add(a, x)", set()),
    "silu": ("a = Conv(x, w) \n s = Sigmoid(a) \n y = Mul(a, s)", set()),
    "gate": (
        "p = GlobalAveragePool(x) \n a = Conv(p, w) \n s = Sigmoid(a) \n y = Mul(s, x)",
        {("y", 0, "gate"), ("y", 1, "gate"), ("p", 0, "pooling")},
    ),
    "gate from a mean over the image": (
        "p = ReduceMean<axes=[2, 3]>(x) \n a = Conv(p, w) \n s = HardSigmoid(a) \n y = Mul(x, s)",
        {("y", 0, "gate"), ("y", 1, "gate"), ("p", 0, "pooling")},
    ),
    "quick GELU": ("t = Mul(x, three) \n s = Sigmoid(t) \n y = Mul(x, s)", set()),
    "spatial attention": ("a = Conv(x, w) \n s = Sigmoid(a) \n y = Mul(x, s)", set()),
    "pooled and not": (
        "p = GlobalAveragePool(x) \n a = Mul(p, x) \n s = Sigmoid(a) \n y = Mul(s, x)",
        {("p", 0, "pooling")},
    ),
    "h-swish": ("t = Add(x, three) \n k = Clip(t, zero, six) \n m = Mul(x, k) \n y = Div(m, six)", set()),
    "concat": ("a = Relu(x) \n b = Concat<axis=1>(a, x) \n y = Conv(b, w2)", {("b", 0, "concat"), ("b", 1, "concat")}),
    "concat into a float op": ("a = Relu(x) \n b = Concat<axis=1>(a, x) \n y = Relu(b)", set()),
}


def graph_of(body: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[N,4,8,8] x) => (float[N,4,H,W] y) {{ {body} }}'
    )
    for name, shape in {"w": (4, 4, 1, 1), "w2": (4, 8, 1, 1), "c": (4,)}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    for name, value in {"zero": 0, "three": 3, "six": 6}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    return model


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_input_of_a_weighted_op_has_its_rule(case: str) -> None:
    body, expected = CASES[case]
    wanted = wanted_sites(graph_of(body))
    assert {(*each.site, each.reason) for each in wanted if each.reason not in ("input", "weight")} == expected


def test_every_convolution_wants_its_input_and_its_weight() -> None:
    wanted = wanted_sites(graph_of("a = Conv(x, w) \n y = Relu(a)"))
    assert [(*each.site, each.tensor, each.reason) for each in wanted] == [
        ("a", 0, "x", "input"),
        ("a", 1, "w", "weight"),
    ]


def test_a_concat_and_its_reader_share_one_scale() -> None:
    wanted = wanted_sites(graph_of(CASES["concat"][0]))
    assert {each.group for each in wanted if each.tensor in ("a", "x", "b")} == {0}
    assert {each.group for each in wanted if each.tensor == "w2"} == {None}
