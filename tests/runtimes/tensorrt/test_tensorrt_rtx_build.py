"""The real TensorRT-RTX builder, which compiles engines on a machine without a GPU."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.onnx_graphs import GraphMaker, block_network, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.building.inspection import inspect_file
from trtdeploy.cuda.api import load_api
from trtdeploy.engine import Engine
from trtdeploy.errors import (
    BuildError,
    ModelError,
    PlanCorruptError,
    PlanIncompatibleError,
    QuantizationError,
    RuntimeUnavailableError,
    TrtDeployError,
    UsageError,
)
from trtdeploy.plan import Plan, manifest_path, read_plan
from trtdeploy.tensors import ShapeRange

trt = pytest.importorskip("tensorrt_rtx")


def config(**options: object) -> BuildConfig:
    return BuildConfig.model_validate({"runtime": "tensorrt-rtx", **options})


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(block_network(), tmp_path_factory.mktemp("rtx") / "block.onnx")


@pytest.fixture(scope="module")
def plan(block: Path) -> Plan:
    shapes = ShapeRange(min=(1, 3, 12, 12), opt=(2, 3, 12, 12), max=(4, 3, 12, 12))
    return build(block, block.with_name("block.rtx"), config(profiles=({"input": shapes},)))


def has_gpu() -> bool:
    try:
        return load_api().device_count() > 0
    except RuntimeUnavailableError:
        return False


without_gpu = pytest.mark.skipif(has_gpu(), reason="says what happens where there is no GPU")


def single(op: str, *, shape: tuple[int | str, ...], output: tuple[int | str, ...] | None = None) -> onnx.ModelProto:
    g = GraphMaker()
    g.node(op, "input", output="y")
    return g.model({"input": shape}, {"y": output or shape})


def test_the_plan_is_the_librarys_own_bytes_with_a_manifest(plan: Plan) -> None:
    content, manifest = read_plan(plan.path)
    assert content.startswith(b"vtrt")
    assert (manifest.runtime.name, manifest.runtime.version) == ("tensorrt-rtx", trt.__version__)
    assert manifest.device.kind == "gpu"
    assert manifest.profiles[0]["input"].max == (4, 3, 12, 12)
    assert [str(spec) for spec in manifest.inputs] == ["input float32[?, 3, 12, 12]"]


@without_gpu
def test_precision_is_what_the_plan_itself_shows_and_is_no_proof(plan: Plan) -> None:
    precision = plan.manifest.precision
    assert precision.evidence == "kernel names"
    assert precision.integer_kernels is None
    assert precision.quantized_layers == precision.weighted_layers > 0
    assert precision.asked_for == {"int8": 100.0}
    assert (precision.runs_in, precision.unknown_percent) == ({"int8": 100.0}, 0.0)
    assert "no proof" in precision.note


@without_gpu
def test_a_partly_quantized_model_has_a_share_between(tmp_path: Path) -> None:
    g = GraphMaker()
    first = g.conv(g.qdq("input"), 3, 8, kernel=3)
    g.quantized = False
    g.conv(first, 8, 8, kernel=3)
    g.nodes[-1].output[0] = "y"
    path = save(g.model({"input": [1, 3, 8, 8]}, {"y": [1, 8, 8, 8]}), tmp_path / "m.onnx")
    precision = build(path, tmp_path / "m.rtx", config()).manifest.precision
    # 3 and 8 input channels with equal kernels, outputs and sizes
    assert precision.asked_for == {"int8": pytest.approx(100 * 3 / 11, abs=0.01)}
    assert precision.runs_in == {
        "int8": pytest.approx(100 * 3 / 11, abs=0.01),
        "float32": pytest.approx(100 * 8 / 11, abs=0.01),
    }
    assert (precision.weighted_layers, precision.quantized_layers) == (2, 1)


@without_gpu
def test_inspect_describes_it_and_says_why_it_does_not_run_here(plan: Plan) -> None:
    facts = inspect_file(plan.path)
    assert facts["runs_here"] is False
    assert "driver" in facts["obstacle"].lower() or "gpu" in facts["obstacle"].lower()
    assert facts["precision"]["asked_for"] == {"int8": 100.0}


@without_gpu
def test_loading_it_says_what_the_machine_lacks(plan: Plan) -> None:
    with pytest.raises(RuntimeUnavailableError) as caught:
        Engine.load(plan.path)
    assert caught.value.exit_code == 3


def test_every_refusal_of_the_parser_names_node_operator_and_reason(tmp_path: Path) -> None:
    g = GraphMaker()
    g.nodes.append(helper.make_node("Det", ["input"], ["d"], name="the_determinant"))
    g.node("Relu", "d", output="y")
    path = save(g.model({"input": [1, 4, 4]}, {"y": [1]}), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"node the_determinant \(Det\)") as caught:
        build(path, tmp_path / "m.rtx", config())
    assert "UNSUPPORTED_NODE" in caught.value.message
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    g = GraphMaker()
    g.nodes.append(helper.make_node("NoSuchOp", ["input"], ["y"], name="n1", domain="my.domain"))
    model = g.model({"input": [1, 4]}, {"y": [1, 4]})
    model.opset_import.append(helper.make_opsetid("my.domain", 1))
    path = save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"n1 \(NoSuchOp\)"):
        build(path, tmp_path / "m.rtx", config())


@pytest.mark.parametrize(
    ("scale", "zero", "dtype", "words"),
    [
        (-0.5, 0, "int8", "scale"),
        (0.0, 0, "int8", "scale"),
        (float("inf"), 0, "int8", "scale"),
        (0.5, 3, "int8", "zero"),
        (0.5, 128, "uint8", "uint8"),
    ],
)
def test_faulty_quantization_is_refused_by_name(
    tmp_path: Path, scale: float, zero: int, dtype: str, words: str
) -> None:
    g = GraphMaker()
    g.node("Conv", g.qdq("input", scale=scale, zero=zero, dtype=dtype), g.weight(4, 3, 1, 1), output="y")
    path = save(g.model({"input": [1, 3, 4, 4]}, {"y": [1, 4, 4, 4]}), tmp_path / "m.onnx")
    with pytest.raises(QuantizationError, match=rf"(?i){words}"):
        build(path, tmp_path / "m.rtx", config())
    assert list(tmp_path.iterdir()) == [path]


def test_per_channel_activations_which_the_library_takes_silently_are_refused(tmp_path: Path) -> None:
    g = GraphMaker()
    quantized = g.qdq("input", scale=np.array([0.1, 0.2, 0.3]), axis=1)
    g.node("Conv", quantized, g.weight(4, 3, 1, 1), output="y")
    path = save(g.model({"input": [1, 3, 4, 4]}, {"y": [1, 4, 4, 4]}), tmp_path / "m.onnx")
    with pytest.raises(QuantizationError, match="per-channel"):
        build(path, tmp_path / "m.rtx", config())


def test_explicit_precision_demands_qdq(tmp_path: Path) -> None:
    path = save(block_network(quantized=False), tmp_path / "float.onnx")
    with pytest.raises(QuantizationError, match="explicit"):
        build(path, tmp_path / "m.rtx", config(precision="explicit"))


class TestProfiles:
    def test_default_covers_batches_when_only_the_batch_is_dynamic(self, block: Path, tmp_path: Path) -> None:
        profiles = build(block, tmp_path / "m.rtx", config()).manifest.profiles
        assert str(profiles[0]["input"]) == "1x3x12x12:8x3x12x12:32x3x12x12"

    def test_a_static_model_needs_none(self, tmp_path: Path) -> None:
        path = save(single("Relu", shape=(2, 3)), tmp_path / "m.onnx")
        assert build(path, tmp_path / "m.rtx", config()).manifest.profiles == ()

    def test_more_dynamic_sizes_than_the_batch_have_no_default(self, tmp_path: Path) -> None:
        path = save(single("Relu", shape=("batch", 3, "h", "w")), tmp_path / "m.onnx")
        with pytest.raises(UsageError, match="no default can be right"):
            build(path, tmp_path / "m.rtx", config())

    def test_an_unknown_name_which_the_library_takes_silently_is_refused(self, block: Path, tmp_path: Path) -> None:
        ones = ShapeRange(min=(1,), opt=(1,), max=(1,))
        with pytest.raises(UsageError, match="nonsense"):
            build(block, tmp_path / "m.rtx", config(profiles=({"nonsense": ones},)))

    @pytest.mark.parametrize("shape", [(1, 3, 12), (1, 4, 12, 12)])
    def test_a_range_that_does_not_fit_is_refused(self, block: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
        with pytest.raises(UsageError, match="does not fit"):
            build(block, tmp_path / "m.rtx", config(profiles=({"input": ShapeRange(min=shape, opt=shape, max=shape)},)))

    def test_two_profiles_are_kept_in_order(self, block: Path, tmp_path: Path) -> None:
        def batch(size: int) -> dict[str, ShapeRange]:
            shape = (size, 3, 12, 12)
            return {"input": ShapeRange(min=shape, opt=shape, max=shape)}

        profiles = build(block, tmp_path / "m.rtx", config(profiles=(batch(1), batch(8)))).manifest.profiles
        assert [profile["input"].opt[0] for profile in profiles] == [1, 8]

    def test_a_profile_without_a_dynamic_input_is_refused(self, tmp_path: Path) -> None:
        g = GraphMaker()
        g.node("Add", "a", "b", output="y")
        path = save(g.model({"a": ["n", 2], "b": ["n", 2]}, {"y": ["n", 2]}), tmp_path / "m.onnx")
        shape = ShapeRange(min=(1, 2), opt=(1, 2), max=(4, 2))
        with pytest.raises(UsageError, match="no range for b"):
            build(path, tmp_path / "m.rtx", config(profiles=({"a": shape},)))


class TestOptions:
    @pytest.mark.parametrize(
        "options",
        [
            {"optimization_level": 1},
            {"workspace_bytes": 1 << 28},
            {"auxiliary_streams": 0},
            {"weight_streaming": True},
            {"sparsity": True},
            {"tf32": False},
            {"refit": "individual"},
            {"profiling_verbosity": "none"},
            {"compute_capabilities": ("8.9", "12.0")},
        ],
    )
    def test_what_this_version_has_is_taken(self, block: Path, tmp_path: Path, options: dict[str, object]) -> None:
        manifest = build(block, tmp_path / "m.rtx", config(**options)).manifest
        assert set(options) <= set(manifest.build_config)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"version_compatible": True}, "version compat"),
            ({"hardware_compatibility": "ampere+"}, "hardware compat"),
            ({"compute_capabilities": ("9.0",)}, "9.0"),
            ({"timing_cache": Path("x.timing")}, "timing cache"),
            ({"threads": 2}, "threads"),
            ({"plugins": (Path("/nonexistent/plugin.so"),)}, "plugin"),
            ({"compute_capabilities": ("current", "8.9")}, "excludes"),
        ],
    )
    def test_what_it_lacks_is_refused_with_the_reason(
        self, block: Path, tmp_path: Path, options: dict[str, object], words: str
    ) -> None:
        with pytest.raises(UsageError, match=words):
            build(block, tmp_path / "m.rtx", config(**options))
        assert list(tmp_path.iterdir()) == []

    @without_gpu
    @pytest.mark.parametrize(
        "options", [{"refit": "all"}, {"strip_weights": True}, {"compute_capabilities": ("current",)}]
    )
    def test_what_needs_a_gpu_says_so(self, block: Path, tmp_path: Path, options: dict[str, object]) -> None:
        with pytest.raises(RuntimeUnavailableError, match="needs a GPU"):
            build(block, tmp_path / "m.rtx", config(**options))

    def test_too_little_scratch_memory_says_which_option_to_change(self, tmp_path: Path) -> None:
        g = GraphMaker()
        g.node("Relu", g.conv(g.qdq("input"), 64, 64, kernel=3), output="y")
        path = save(g.model({"input": [64, 64, 128, 128]}, {"y": [64, 64, 128, 128]}), tmp_path / "m.onnx")
        with pytest.raises(BuildError, match="workspace-mib") as caught:
            build(path, tmp_path / "m.rtx", config(workspace_bytes=1 << 20))
        assert len(set(caught.value.log_lines)) == len(caught.value.log_lines)

    def test_targets_are_in_the_manifest(self, block: Path, tmp_path: Path) -> None:
        assert build(block, tmp_path / "m.rtx", config()).manifest.device.capability == "8.0,8.6,8.9,12.0+"
        narrow = config(compute_capabilities=("8.9",))
        assert build(block, tmp_path / "m.rtx", narrow).manifest.device.capability == "8.9"

    def test_ranges_as_such_are_gone(self, block: Path, tmp_path: Path) -> None:
        ranges = tmp_path / "r.json"
        ranges.write_text(json.dumps({"format": 1, "ranges": {"input": 3.0}}))
        float_model = save(block_network(quantized=False), tmp_path / "float.onnx")
        with pytest.raises(UsageError, match="no dynamic ranges"):
            build(float_model, tmp_path / "m.rtx", config(ranges=ranges, implicit=True))

    @pytest.mark.parametrize("kind", ["fp16"])
    def test_what_is_not_quantized_can_be_cast(self, block: Path, tmp_path: Path, kind: str) -> None:
        manifest = build(block, tmp_path / "m.rtx", config(high_precision=kind)).manifest
        assert manifest.precision.asked_for == manifest.precision.runs_in == {"int8": 100.0}
        assert manifest.inputs[0].dtype == "float32"


class TestProgressAndCancellation:
    def test_progress_is_told_and_ends(self, block: Path, tmp_path: Path) -> None:
        told: list[tuple[str, int, int]] = []
        build(block, tmp_path / "m.rtx", config(), progress=lambda *step: told.append(step))
        assert any(phase == "Building engine" for phase, _, _ in told)
        assert all(0 <= done <= total for _, done, total in told)

    @pytest.mark.parametrize("after", [1, 5, 40])
    def test_an_interrupt_cancels_and_leaves_nothing(self, block: Path, tmp_path: Path, after: int) -> None:
        count = 0

        def interrupt(*_: object) -> None:
            nonlocal count
            count += 1
            if count == after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(block, tmp_path / "m.rtx", config(), progress=interrupt)
        assert list(tmp_path.iterdir()) == []
        # the process can build again
        assert build(block, tmp_path / "m.rtx", config()).path.exists()

    def test_builds_in_several_threads_follow_one_another(self, block: Path, tmp_path: Path) -> None:
        running: list[str] = []
        overlaps: list[str] = []

        def work(name: str) -> None:
            def watch(phase: str, done: int, total: int) -> None:
                if phase == "Building engine" and done == 0 and name not in running:
                    running.append(name)
                    overlaps.extend(other for other in running if other != name)
                if phase == "Building engine" and done == total and name in running:
                    running.remove(name)

            build(block, tmp_path / f"{name}.rtx", config(), progress=watch)

        threads = [threading.Thread(target=work, args=(f"t{index}",)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert overlaps == []
        assert len(list(tmp_path.glob("*.rtx"))) == 3


class TestIsolation:
    def test_a_child_builds_the_same(self, block: Path, tmp_path: Path, plan: Plan) -> None:
        told: list[str] = []
        same = config(isolate=True, profiles=plan.manifest.profiles)
        isolated = build(block, tmp_path / "m.rtx", same, progress=lambda phase, *_: told.append(phase))
        assert read_plan(isolated.path)[1].precision == plan.manifest.precision
        assert "Building engine" in told

    def test_its_errors_are_the_same(self, tmp_path: Path) -> None:
        path = save(single("Det", shape=(1, 4, 4), output=(1,)), tmp_path / "m.onnx")
        with pytest.raises(ModelError, match="Det"):
            build(path, tmp_path / "m.rtx", config(isolate=True))

    def test_its_crash_is_an_error_here(self, block: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "sitecustomize.py").write_text(
            "import os, sys\nif 'trtdeploy.building.worker' in sys.orig_argv: os.kill(os.getpid(), 11)\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(BuildError, match="SIGSEGV"):
            build(block, tmp_path / "m.rtx", config(isolate=True))
        assert not (tmp_path / "m.rtx").exists()


def test_messages_of_the_library_reach_logging(block: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="trtdeploy.tensorrt"):
        build(block, tmp_path / "m.rtx", config())
    assert any("Opset version" in record.message for record in caplog.records)


def test_a_plan_of_another_version_is_refused_before_its_bytes_are_read(plan: Plan, tmp_path: Path) -> None:
    copy = tmp_path / "other.rtx"
    copy.write_bytes(b"these bytes must never reach a deserializer")
    manifest = json.loads(manifest_path(plan.path).read_text())
    manifest["runtime"]["version"] = "1.0.0.1"
    manifest_path(copy).write_text(json.dumps(manifest))
    with pytest.raises(PlanIncompatibleError, match=r"1\.0\.0\.1"):
        Engine.load(copy)


@without_gpu
def test_a_truncated_plan_is_still_first_of_all_one_that_needs_a_gpu(plan: Plan, tmp_path: Path) -> None:
    copy = tmp_path / "cut.rtx"
    copy.write_bytes(plan.path.read_bytes()[:1000])
    manifest_path(copy).write_text(manifest_path(plan.path).read_text())
    with pytest.raises(RuntimeUnavailableError):
        Engine.load(copy)
    with pytest.raises(PlanCorruptError):
        inspect_file(copy)


def test_a_full_disk_leaves_the_old_plan(block: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.rtx"
    old = build(block, target, config())
    before = target.read_bytes(), manifest_path(target).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TrtDeployError, match="No space left"):
        build(block, old.path, config())
    assert (target.read_bytes(), manifest_path(target).read_bytes()) == before


def test_edge_case_graphs_build(tmp_path: Path) -> None:
    """Integer input, scalar output, no weighted layer at all, two outputs of one tensor."""
    g = GraphMaker()
    g.node("Cast", "ids", output="f", to=TensorProto.FLOAT)
    g.node("ReduceSum", "f", output="total", keepdims=0)
    g.node("Relu", "f", output="y")
    model = g.model({"ids": [2, 3]}, {"total": [], "y": [2, 3]}, dtype=TensorProto.INT64)
    plan = build(save(model, tmp_path / "m.onnx"), tmp_path / "m.rtx", config())
    assert plan.manifest.inputs[0].dtype == "int64"
    assert plan.manifest.precision.weighted_layers == 0
