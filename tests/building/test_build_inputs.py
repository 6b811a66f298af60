"""What a build checks and measures on: real inputs, drawn ones of the right meaning, or else an error."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.onnx_graphs import GraphMaker, Size, save
from trtdeploy.building.build import BuildConfig, InputSource, build
from trtdeploy.engine import Engine
from trtdeploy.engine.benchmark import bench
from trtdeploy.errors import DataError, ModelError, QuantizationError, UsageError
from trtdeploy.onnxgraph.reading.source import load_source
from trtdeploy.quantizing import PtqOptions, quantize
from trtdeploy.runtimes.trial_inputs import trial_inputs
from trtdeploy.tensors import Array, ShapeRange

QUICK = BuildConfig(runtime="onnxruntime", timing_rounds=1, threads=1)
RTX = BuildConfig(runtime="tensorrt-rtx")


def typed(model: onnx.ModelProto, **types: int) -> onnx.ModelProto:
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.elem_type = types.get(value.name, value.type.tensor_type.elem_type)
    return model


def encoder(folder: Path, *, names: tuple[Size, Size] = ("batch", "tokens")) -> Path:
    """Write a text encoder: token ids of a table with 50 rows, kinds of one with 2, a mask, positions, one layer."""
    g = GraphMaker(quantized=False)
    words = g.node("Gather", g.constant(g.rng.standard_normal((50, 8)).astype(np.float32)), "ids")
    kinds = g.node("Gather", g.constant(g.rng.standard_normal((2, 8)).astype(np.float32)), "kinds")
    hidden = g.node("Add", words, kinds)
    mask = g.node("Unsqueeze", g.node("Cast", "mask", to=TensorProto.FLOAT), g.constant(np.array([2])))
    absent = g.node("Mul", g.node("Sub", g.constant(np.float32(1)), mask), g.constant(np.float32(-1e4)))
    scores = g.node("Softmax", g.node("Add", g.node("MatMul", hidden, g.weight(8, 8)), absent), axis=1)
    g.node("Gemm", g.node("ReduceMean", scores, axes=[1], keepdims=0), g.weight(8, 3), output="y")
    shape = list(names)
    model = g.model({"ids": shape, "mask": shape, "kinds": shape}, {"y": [names[0], 3]})
    return save(typed(model, ids=7, mask=7, kinds=7), folder / "encoder.onnx")


def pyramid(folder: Path) -> Path:
    """Write a detector whose levels only join where height and width are multiples of 4."""
    g = GraphMaker(quantized=False)
    large = g.conv("image", 3, 4, kernel=3, stride=2)
    small = g.node("MaxPool", large, kernel_shape=[2, 2], strides=[2, 2])
    scales = g.constant(np.array([1, 1, 2, 2], np.float32))
    joined = g.node("Concat", large, g.node("Resize", small, "", scales, mode="nearest"), axis=1)
    g.node("Conv", joined, g.weight(2, 8, 1, 1), output="boxes")
    model = g.model({"image": ["n", 3, "height", "width"]}, {"boxes": ["n", 2, "h", "w"]})
    return save(model, folder / "pyramid.onnx")


def by_rate(folder: Path) -> Path:
    """Write a voice model that computes something else at 16 kHz than at any other rate, and needs 4 values."""
    g = GraphMaker(quantized=False)
    value = helper.make_tensor_value_info("then", TensorProto.FLOAT, None)
    other = helper.make_tensor_value_info("else", TensorProto.FLOAT, None)
    branches = [
        helper.make_graph([helper.make_node("Identity", ["audio"], ["then"])], "a", [], [value]),
        helper.make_graph([helper.make_node("Neg", ["audio"], ["else"])], "b", [], [other]),
    ]
    is_fast = g.node(
        "Equal", g.node("Reshape", "rate", g.constant(np.array([], np.int64))), g.constant(np.int64(16000))
    )
    chosen = g.node("If", is_fast, then_branch=branches[0], else_branch=branches[1])
    g.node("Pad", chosen, g.constant(np.array([0, 2, 0, 0])), mode="reflect", output="padded")
    g.node("ReduceSum", "padded", g.constant(np.array([1])), output="y")
    return save(typed(g.model({"audio": ["n", "t"], "rate": []}, {"y": ["n", 1]}), rate=7), folder / "rate.onnx")


def drawn(path: Path, **shapes: tuple[int, ...]) -> dict[str, Array]:
    source = load_source(path)
    return trial_inputs(source.proto, source.inputs, shapes).arrays


def measured(path: Path) -> tuple[dict[str, tuple[int, ...]], str]:
    tactic = Engine.load(path).manifest.tactic
    assert tactic is not None
    return tactic.shapes, tactic.inputs


def test_token_ids_are_rows_of_their_table_and_a_mask_is_ones(tmp_path: Path) -> None:
    inputs = drawn(encoder(tmp_path), ids=(3, 40))
    assert {name: array.shape for name, array in inputs.items()} == dict.fromkeys(("ids", "mask", "kinds"), (3, 40))
    assert inputs["ids"].max() > 40
    assert len(np.unique(inputs["ids"])) > 30
    assert 0 <= inputs["ids"].min() <= inputs["ids"].max() < 50
    assert set(np.unique(inputs["kinds"])) == {0, 1}
    assert (inputs["mask"] == 1).all()


def test_what_is_compared_with_a_row_of_numbers_is_one_of_them(tmp_path: Path) -> None:
    g = GraphMaker(quantized=False)
    hot = g.node(
        "Equal", g.node("Unsqueeze", "bytes", g.constant(np.array([2]))), g.constant(np.arange(257, dtype=np.int32))
    )
    g.node("MatMul", g.node("Cast", hot, to=TensorProto.FLOAT), g.weight(257, 4), output="y")
    model = typed(g.model({"bytes": ["n", 64]}, {"y": ["n", 64, 4]}), bytes=TensorProto.INT32)
    values = drawn(save(model, tmp_path / "m.onnx"), bytes=(4, 64))["bytes"]
    assert values.dtype == np.int32
    assert values.min() >= 0
    assert 200 < values.max() <= 256


def test_pixels_have_all_values(tmp_path: Path) -> None:
    g = GraphMaker(quantized=False)
    g.node("Cast", "x", to=TensorProto.FLOAT, output="y")
    model = typed(g.model({"x": ["n", 500]}, {"y": ["n", 500]}), x=TensorProto.UINT8)
    values = drawn(save(model, tmp_path / "m.onnx"))["x"]
    assert (values.min() < 20, values.max() > 235) == (True, True)


@pytest.mark.parametrize("use", ["Reshape", "Range", "Less"])
def test_an_integer_that_decides_sizes_has_to_be_given(use: str, tmp_path: Path) -> None:
    g = GraphMaker(quantized=False)
    if use == "Reshape":
        g.node("Reshape", "x", g.node("Cast", "k", to=TensorProto.INT64), output="y")
    elif use == "Range":
        last = g.node("ReduceMax", g.node("Mul", "k", g.constant(np.array([2]))), keepdims=0)
        counted = g.node("Range", g.constant(np.int64(0)), last, g.constant(np.int64(1)))
        g.node("Add", "x", g.node("Cast", counted, to=TensorProto.FLOAT), output="y")
    else:
        places = g.node("Range", g.constant(np.int64(0)), g.constant(np.int64(4)), g.constant(np.int64(1)))
        g.node("Where", g.node("Less", places, "k"), "x", g.constant(np.float32(0)), output="y")
    path = save(typed(g.model({"x": [4], "k": [1]}, {"y": None}), k=7), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=r"right for the input k int64\[1\].*\n.*--fixed k=VALUE.*--data"):
        build(path, tmp_path / "m.plan", QUICK)
    build(path, tmp_path / "m.plan", QUICK, inputs=InputSource(fixed=("k=4" if use != "Range" else "k=2",)))
    assert measured(tmp_path / "m.plan") == (
        {"x": (4,), "k": (1,)},
        f"k={2 if use == 'Range' else 4}, random numbers for x",
    )


def test_open_sizes_that_cannot_be_1_are_to_be_given_and_not_the_models_fault(tmp_path: Path) -> None:
    path = pyramid(tmp_path)
    with pytest.raises(UsageError) as caught:
        build(path, tmp_path / "p.plan", QUICK)
    assert "image=1x3x1x1" in str(caught.value)
    assert "--shape image=1x3xaxb" in str(caught.value)
    assert "--data" in str(caught.value)
    shapes = ShapeRange(min=(1, 3, 32, 32), opt=(2, 3, 64, 32), max=(4, 3, 64, 64))
    build(path, tmp_path / "p.plan", QUICK.model_copy(update={"profiles": ({"image": shapes},)}))
    assert measured(tmp_path / "p.plan") == ({"image": (2, 3, 64, 32)}, "random numbers")


def test_a_shape_that_the_model_cannot_take_is_the_models_word(tmp_path: Path) -> None:
    odd = ShapeRange(min=(1, 3, 6, 6), opt=(1, 3, 6, 6), max=(1, 3, 6, 6))
    with pytest.raises(ModelError, match="image=1x3x6x6"):
        build(pyramid(tmp_path), tmp_path / "p.plan", QUICK.model_copy(update={"profiles": ({"image": odd},)}))


def test_one_token_is_not_measured_silently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build(encoder(tmp_path), tmp_path / "e.plan", QUICK)
    assert "open sizes at 1 (ids=1x1, mask=1x1, kinds=1x1)" in caplog.text
    assert "--shape ids=1xa" in caplog.text
    assert measured(tmp_path / "e.plan")[0] == dict.fromkeys(("ids", "mask", "kinds"), (1, 1))


def test_sizes_of_one_name_are_given_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profile = {"ids": ShapeRange(min=(1, 8), opt=(2, 16), max=(4, 32))}
    config = QUICK.model_copy(update={"profiles": (profile,)})
    with caplog.at_level(logging.WARNING):
        build(encoder(tmp_path), tmp_path / "e.plan", config)
    assert "open sizes" not in caplog.text
    assert measured(tmp_path / "e.plan")[0] == dict.fromkeys(("ids", "mask", "kinds"), (2, 16))


def token_files(folder: Path) -> Path:
    (folder / "samples").mkdir()
    for number, length in enumerate((8, 24, 12, 12)):
        ids = np.full((3, length), number, np.int64)
        np.savez(folder / "samples" / f"{number}.npz", ids=ids, mask=np.ones_like(ids), kinds=np.zeros_like(ids))
    return folder / "samples"


def test_real_inputs_are_measured_in_the_shape_that_most_have_or_that_is_served_best(tmp_path: Path) -> None:
    samples = InputSource(data=str(token_files(tmp_path)))
    build(encoder(tmp_path), tmp_path / "e.plan", QUICK, inputs=samples)
    assert measured(tmp_path / "e.plan") == (
        dict.fromkeys(("ids", "mask", "kinds"), (1, 12)),
        "1 of 12 samples of samples",
    )
    served = {"ids": ShapeRange(min=(1, 8), opt=(5, 24), max=(8, 32))}
    build(encoder(tmp_path), tmp_path / "e.plan", QUICK.model_copy(update={"profiles": (served,)}), inputs=samples)
    assert measured(tmp_path / "e.plan")[0]["ids"] == (5, 24)
    narrow = {"ids": ShapeRange(min=(1, 4), opt=(1, 5), max=(1, 6))}
    with pytest.raises(UsageError, match=r"No sample of .* lies in --shape ids=1x4:1x5:1x6"):
        build(encoder(tmp_path), tmp_path / "e.plan", QUICK.model_copy(update={"profiles": (narrow,)}), inputs=samples)


def test_profiles_of_tensorrt_come_from_real_inputs(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(UsageError, match=r"--data SAMPLES"):
        build(encoder(tmp_path), tmp_path / "e.plan", RTX)
    plan = build(encoder(tmp_path), tmp_path / "e.plan", RTX, inputs=InputSource(data=str(token_files(tmp_path))))
    wanted = ShapeRange(min=(1, 8), opt=(8, 12), max=(32, 24))
    assert plan.manifest.profiles == (dict.fromkeys(("ids", "mask", "kinds"), wanted),)


def test_what_is_the_same_in_every_run_is_given_apart(tmp_path: Path) -> None:
    path = by_rate(tmp_path)
    with pytest.raises(UsageError, match=r"rate int64\[\]: it is compared with 16000.*\n.*--fixed rate=VALUE"):
        build(path, tmp_path / "r.plan", QUICK)
    np.save(tmp_path / "audio.npy", np.ones((2, 6), np.float32))
    with pytest.raises(DataError):
        build(path, tmp_path / "r.plan", QUICK, inputs=InputSource(data=str(tmp_path / "audio.npy")))
    real = InputSource(data=str(tmp_path / "audio.npy"), fixed=("rate=16000",))
    build(path, tmp_path / "r.plan", QUICK.model_copy(update={"isolate": True}), inputs=real)
    assert measured(tmp_path / "r.plan") == (
        {"audio": (1, 6), "rate": ()},
        "1 of 2 samples of audio.npy, rate=16000",
    )


def recurrent(folder: Path) -> Path:
    """Write a step of a recurrent network: the size of the batch lies in its state, too."""
    g = GraphMaker(quantized=False)
    last = g.node("Gather", "state", g.constant(np.int64(0)), axis=0)
    both = g.node("Concat", "x", last, axis=1)
    g.node("Gemm", both, g.weight(3, 8), transB=1, output="y")
    return save(g.model({"x": ["n", 4], "state": [2, "n", 4]}, {"y": ["n", 3]}), folder / "step.onnx")


def test_a_state_that_is_given_for_one_is_measured_for_one(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32))
    options = PtqOptions(method="max", fixed=("state=0",), batch_size=1)
    done = quantize(recurrent(tmp_path), tmp_path / "q.onnx", str(tmp_path / "x.npy"), options)
    assert done.quantized_layers == 1
    real = InputSource(data=str(tmp_path / "x.npy"), fixed=("state=0",))
    build(tmp_path / "q.onnx", tmp_path / "q.plan", QUICK, inputs=real)
    assert measured(tmp_path / "q.plan")[0] == {"x": (1, 4), "state": (2, 1, 4)}
    profile = {"x": ShapeRange(min=(1, 4), opt=(4, 4), max=(8, 4))}
    with pytest.raises(ModelError, match=r"x=4x4, state=2x1x4"):
        build(tmp_path / "q.onnx", tmp_path / "q.plan", QUICK.model_copy(update={"profiles": (profile,)}), inputs=real)


def test_layers_in_branches_are_named_where_nothing_else_can_be_quantized(tmp_path: Path) -> None:
    g = GraphMaker(quantized=False)
    value = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    inner = helper.make_graph([helper.make_node("MatMul", ["x", g.weight(4, 3)], ["z"])], "a", [], [value])
    g.node("If", "flag", then_branch=inner, else_branch=inner, output="y")
    model = typed(g.model({"x": ["n", 4], "flag": []}, {"y": ["n", 3]}), flag=TensorProto.BOOL)
    np.save(tmp_path / "x.npy", np.ones((4, 4), np.float32))
    options = PtqOptions(method="max", fixed=("flag=true",))
    with pytest.raises(QuantizationError, match="2 layers in the branches of If y cannot be reached"):
        quantize(save(model, tmp_path / "m.onnx"), tmp_path / "q.onnx", str(tmp_path / "x.npy"), options)


def test_a_plan_is_benchmarked_in_the_sizes_that_were_measured(tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", np.random.default_rng(0).standard_normal((3, 3, 32, 48)).astype(np.float32))
    plan = build(pyramid(tmp_path), tmp_path / "p.plan", QUICK, inputs=InputSource(data=str(tmp_path / "image.npy")))
    assert plan.manifest.shapes_of_batch(5) == {"image": [5, 3, 32, 48]}
    (point,) = bench(plan.path, batches=[2], contexts=[1], warm_up_s=0, duration_s=0.05)
    assert point.batch == 2
