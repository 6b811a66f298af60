"""Tactics of the ONNX Runtime builder: all of them give the model's own answers, wrong ones are thrown out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.onnx_graphs import GraphMaker, as_exported, batch_profile, block_network, doubling, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.engine import Engine
from trtdeploy.errors import BuildError
from trtdeploy.onnxgraph.graph import fold_weights
from trtdeploy.runtimes.onnxruntime.building import builder, tactics
from trtdeploy.runtimes.onnxruntime.building.measure import median_milliseconds, relative_error
from trtdeploy.runtimes.onnxruntime.building.tactics import Tactic, tactics_for
from trtdeploy.runtimes.onnxruntime.cpu import instruction_sets, usable_cores
from trtdeploy.runtimes.onnxruntime.session import make_session
from trtdeploy.tensors import Array

ALL_TACTICS = [(quantized, tactic) for quantized in (True, False) for tactic in tactics_for(quantized)]
QUICK = BuildConfig(timing_rounds=1)


def images(batch: int, *sample: int, seed: int = 5) -> Array:
    return np.random.default_rng(seed).standard_normal((batch, *sample)).astype(np.float32)


@pytest.mark.parametrize(
    ("quantized", "tactic"), ALL_TACTICS, ids=[f"{'int8' if q else 'float'}-{t.name}" for q, t in ALL_TACTICS]
)
@pytest.mark.parametrize("channels", [16, 20, 27])
def test_every_tactic_gives_the_answers_of_the_model_as_exported(
    quantized: bool, tactic: Tactic, channels: int
) -> None:
    model = block_network(channels=channels, quantized=quantized)
    content = tactic.compile(model)
    if content is None:
        # ONNX Runtime blocks only channels in multiples of four: there is nothing to move
        assert (tactic.name, channels) == ("float-weights-blocked-qdq", 27)
        return
    if tactic.name == "integer-products":
        kernels = [node.op_type for node in onnx.load_model_from_string(content).graph.node]
        assert kernels.count("MatMulIntegerToFloat") == 6  # all but the stem and the depthwise convolution
    compiled = make_session(content, threads=2)
    for batch in (1, 7, 32):
        inputs = {"input": images(batch, 3, 12, 12)}
        outputs = compiled.run(None, inputs)
        assert relative_error(outputs, as_exported(model, inputs)) < (0.02 if quantized else 1e-5)


def test_the_networks_of_this_file_tell_right_from_wrong() -> None:
    """Without this, the bound of the test above could be met by anything."""
    inputs = {"input": images(7, 3, 12, 12)}
    right = as_exported(block_network(), inputs)
    assert relative_error(as_exported(block_network(quantized=False), inputs), right) > 1e-4
    assert relative_error(as_exported(block_network(seed=1), inputs), right) > 0.5


@pytest.mark.parametrize("tactic", tactics_for(True), ids=lambda tactic: tactic.name)
def test_tactics_serve_the_shared_classifier_at_every_batch_size(tactic: Tactic, qdq_onnx: Path) -> None:
    content = tactic.compile(onnx.load(qdq_onnx))
    if content is None:
        assert tactic.name == "float-weights-integer-gates"  # it has none
        return
    session = make_session(content)
    for batch in (1, 7, 32):
        inputs = {"input": images(batch, 3, 32, 32)}
        assert relative_error(session.run(None, inputs), as_exported(qdq_onnx, inputs)) < 0.02


def test_a_plan_answers_like_its_model_over_the_whole_profile(tmp_path: Path) -> None:
    source = save(block_network(), tmp_path / "block.onnx")
    config = BuildConfig(profiles=(batch_profile("input", 32, 3, 12, 12),), timing_rounds=1)
    plan = build(source, tmp_path / "block.plan", config)
    with Engine.load(plan.path) as engine:
        for batch in (1, 7, 32):
            inputs = {"input": images(batch, 3, 12, 12)}
            outputs = engine.infer(inputs)
            assert list(outputs) == ["logits", "features"]
            assert relative_error(list(outputs.values()), as_exported(source, inputs)) < 0.02


def test_the_manifest_names_every_candidate_and_the_fastest_is_chosen(tmp_path: Path) -> None:
    source = save(block_network(), tmp_path / "block.onnx")
    tactic = build(source, tmp_path / "block.plan", QUICK).manifest.tactic
    assert tactic is not None
    threads = sorted({1, usable_cores()})
    names = {tactic.name for tactic in tactics_for(True)} - set(tactic.rejected)
    expected = {f"{name}, {n} thread{'s' if n > 1 else ''}" for name in names for n in threads}
    assert set(tactic.milliseconds) == expected
    assert all(milliseconds > 0 for milliseconds in tactic.milliseconds.values())
    chosen = f"{tactic.name}, {tactic.threads} thread{'s' if tactic.threads > 1 else ''}"
    assert tactic.milliseconds[chosen] == min(tactic.milliseconds.values())


def test_a_fixed_number_of_threads_is_the_only_one_measured_and_is_used(tmp_path: Path) -> None:
    source = save(block_network(), tmp_path / "block.onnx")
    plan = build(source, tmp_path / "block.plan", BuildConfig(threads=3, timing_rounds=1))
    assert plan.manifest.tactic is not None
    assert plan.manifest.tactic.threads == 3
    assert all(key.endswith(", 3 threads") for key in plan.manifest.tactic.milliseconds)
    assert plan.manifest.build_config == {"threads": 3, "timing_rounds": 1}


def test_a_float_model_builds_and_is_not_called_quantized(tmp_path: Path) -> None:
    model = block_network(quantized=False)
    source = save(model, tmp_path / "float.onnx")
    plan = build(source, tmp_path / "float.plan", QUICK)
    facts = plan.manifest.precision
    assert (facts.weighted_layers, facts.quantized_layers, facts.integer_kernels) == (8, 0, 0)
    assert "no Q/DQ" in facts.note
    inputs = {"input": images(7, 3, 12, 12)}
    with Engine.load(plan.path) as engine:
        assert relative_error(list(engine.infer(inputs).values()), as_exported(model, inputs)) < 1e-5


def test_quantized_layers_are_counted(tmp_path: Path) -> None:
    facts = build(save(block_network(), tmp_path / "m.onnx"), tmp_path / "m.plan", QUICK).manifest.precision
    assert (facts.weighted_layers, facts.quantized_layers) == (8, 8)


def test_q_dq_without_constant_weights_only_leaves_the_tactics_that_change_something(tmp_path: Path) -> None:
    g = GraphMaker()
    g.node("Relu", g.qdq("x"), output="y")
    source = save(g.model({"x": ["batch", 4]}, {"y": ["batch", 4]}), tmp_path / "m.onnx")
    tactic = build(source, tmp_path / "m.plan", QUICK).manifest.tactic
    assert tactic is not None
    assert tactic.name == "integer-kernels"
    assert set(tactic.rejected) == {each.name for each in tactics_for(True)} - {"integer-kernels"}
    assert set(tactic.rejected.values()) == {"changes nothing for this model"}


def corrupting(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    folded, count = fold_weights(model)
    for tensor in folded.graph.initializer:
        if len(tensor.dims) == 4:
            wrong = onnx.numpy_helper.to_array(tensor) * np.float32(1.2)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wrong, tensor.name))
    return folded, count


def test_a_wrong_tactic_is_rejected_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tactics, "fold_weights", corrupting)
    source = save(block_network(), tmp_path / "block.onnx")
    plan = build(source, tmp_path / "block.plan", QUICK)
    assert plan.manifest.tactic is not None
    assert plan.manifest.tactic.name == "integer-kernels"
    assert set(plan.manifest.tactic.rejected) == {each.name for each in tactics_for(True)} - {"integer-kernels"}
    assert all("differ by" in reason for reason in plan.manifest.tactic.rejected.values())
    assert not any("float-weights" in key for key in plan.manifest.tactic.milliseconds)


def nan_network(_: onnx.ModelProto) -> bytes:
    g = GraphMaker()
    minus_one = g.constant(np.float32(-1))
    zeros = g.node("Mul", "x", g.constant(np.float32(0)))
    g.node("Sqrt", g.node("Add", zeros, minus_one), output="y")
    return g.model({"x": ["batch", 4]}, {"y": ["batch", 4]}).SerializeToString()


def test_a_tactic_that_answers_nan_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = [Tactic("good", lambda model: model.SerializeToString()), Tactic("nan", nan_network)]
    monkeypatch.setattr(builder, "tactics_for", lambda quantized: candidates)
    plan = build(save(doubling(), tmp_path / "m.onnx"), tmp_path / "m.plan", QUICK)
    assert plan.manifest.tactic is not None
    assert plan.manifest.tactic.name == "good"
    assert list(plan.manifest.tactic.rejected) == ["nan"]


def test_a_tactic_that_the_runtime_cannot_load_is_rejected_with_the_runtimes_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = GraphMaker()
    g.node("NoSuchOperator", "x", output="y")
    broken = g.model({"x": ["batch", 4]}, {"y": ["batch", 4]}).SerializeToString()
    candidates = [
        Tactic("good", lambda model: model.SerializeToString()),
        Tactic("unknown-operator", lambda model: broken),
        Tactic("garbage", lambda model: b"\xff" * 64),
    ]
    monkeypatch.setattr(builder, "tactics_for", lambda quantized: candidates)
    plan = build(save(doubling(), tmp_path / "m.onnx"), tmp_path / "m.plan", QUICK)
    assert plan.manifest.tactic is not None
    assert set(plan.manifest.tactic.rejected) == {"unknown-operator", "garbage"}
    assert "NoSuchOperator" in plan.manifest.tactic.rejected["unknown-operator"]


def test_a_build_without_any_right_tactic_fails_with_all_reasons_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = [Tactic("nan", nan_network), Tactic("nothing", lambda model: None)]
    monkeypatch.setattr(builder, "tactics_for", lambda quantized: candidates)
    source = save(doubling(), tmp_path / "m.onnx")
    with pytest.raises(BuildError, match=r"nan: outputs differ.*nothing: changes nothing") as caught:
        build(source, tmp_path / "m.plan", QUICK)
    assert caught.value.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx"]


def test_progress_is_reported_for_both_phases_up_to_the_end(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    build(
        save(block_network(), tmp_path / "m.onnx"),
        tmp_path / "m.plan",
        BuildConfig(timing_rounds=3),
        progress=lambda phase, done, total: steps.append((phase, done, total)),
    )
    assert [step for step in steps if step[0] == "optimizing"] == [
        ("optimizing", done, len(tactics_for(True))) for done in range(len(tactics_for(True)) + 1)
    ]
    assert [step for step in steps if step[0] == "timing"] == [("timing", done, 3) for done in (1, 2, 3)]


def test_a_plan_in_blocked_layout_depends_on_the_instruction_sets_another_on_the_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(block_network(quantized=False, channels=32), tmp_path / "m.onnx")
    for name, capability in (
        ("blocked-layout", instruction_sets()),
        ("plain-layout", instruction_sets().split("+")[0]),
    ):
        only = [tactic for tactic in tactics_for(False) if tactic.name == name]
        monkeypatch.setattr(builder, "tactics_for", lambda quantized, only=only: only)
        assert build(source, tmp_path / "m.plan", QUICK).manifest.device.capability == capability


@pytest.mark.parametrize(
    ("output", "reference", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.0, 0.0], [3.0, 4.0], 1.0),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([0.5, 0.0], [0.0, 0.0], 0.5),
        ([np.nan, 1.0], [1.0, 1.0], np.inf),
        ([np.inf, 1.0], [1.0, 1.0], np.inf),
        ([1.0, 1.0], [np.nan, 1.0], np.inf),
        ([np.nan, 1.0], [np.nan, 1.0], 0.0),
        ([np.inf, 1.5], [np.inf, 1.0], 0.5),
        ([-np.inf, 1.0], [np.inf, 1.0], np.inf),
        ([-1e308, 1e308], [1e308, 1e308], np.inf),
        ([1.0, 2.0, 3.0], [1.0, 2.0], np.inf),
    ],
)
def test_relative_error(output: list[float], reference: list[float], error: float) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        assert relative_error([np.array(output)], [np.array(reference)]) == pytest.approx(error)


def test_the_worst_output_counts() -> None:
    good, bad = np.ones(3, np.float32), np.zeros(3, np.float32)
    assert relative_error([good, bad], [good, good]) == 1.0
    assert relative_error([bad, good], [good, good]) == 1.0


class CountingSession:
    def __init__(self) -> None:
        self.runs = 0

    def run(self, names: None, inputs: dict[str, Array]) -> None:
        self.runs += 1


def test_sessions_take_turns_and_each_first_run_is_not_counted() -> None:
    sessions = {"a": CountingSession(), "b": CountingSession()}
    medians = median_milliseconds(sessions, {}, rounds=3)
    assert set(medians) == {"a", "b"}
    assert [session.runs for session in sessions.values()] == [4, 4]
