"""build() and what happens between its files and Engine.load: shapes, full disks, damage, plans of other machines."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trtdeploy
from tests.onnx_graphs import GraphMaker, batch_profile, block_network, doubling, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.engine import Engine
from trtdeploy.errors import (
    BuildError,
    LedgerError,
    PlanCorruptError,
    PlanError,
    PlanIncompatibleError,
    RuntimeUnavailableError,
    TimingCacheError,
    UsageError,
)
from trtdeploy.files import sha256_file
from trtdeploy.plan import Plan, manifest_path, read_plan
from trtdeploy.runtimes.onnxruntime import runtime as ort_runtime
from trtdeploy.runtimes.onnxruntime.cpu import instruction_sets
from trtdeploy.runtimes.onnxruntime.session import make_session
from trtdeploy.tensors import ShapeRange

QUICK = BuildConfig(timing_rounds=1, threads=1)


@pytest.fixture
def plan(qdq_plan: Plan, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    path = tmp_path / "copy.plan"
    shutil.copy(qdq_plan.path, path)
    shutil.copy(manifest_path(qdq_plan.path), manifest_path(path))
    return path


def edit_manifest(plan: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(manifest_path(plan).read_text())
    change(content)
    manifest_path(plan).write_text(json.dumps(content))


def put(plan: Path, content: bytes) -> None:
    """Replace the plan's bytes and make its manifest agree."""
    plan.write_bytes(content)
    edit_manifest(plan, lambda m: m.update(plan_bytes=len(content), plan_sha256=hashlib.sha256(content).hexdigest()))


# building


def test_the_manifest_says_what_was_built_from_what(qdq_plan: Plan, qdq_onnx: Path) -> None:
    content, manifest = read_plan(qdq_plan.path)
    assert manifest == qdq_plan.manifest
    assert manifest.onnx.sha256 == sha256_file(qdq_onnx)
    assert manifest.onnx.file == qdq_onnx.name
    assert (manifest.runtime.name, manifest.runtime.version) == ("onnxruntime", onnxruntime.__version__)
    assert manifest.trtdeploy_version == trtdeploy.__version__
    assert manifest.plan_bytes == len(content)
    assert [str(spec) for spec in manifest.inputs + manifest.outputs] == [
        "input float32[?, 3, 32, 32]",
        "logits float32[?, 10]",
    ]
    assert manifest.labels == tuple("0123456789")
    assert manifest.preprocessing is not None
    assert manifest.profiles[0]["input"].max == (32, 3, 32, 32)


def test_a_model_with_a_scalar_and_an_integer_input_builds_and_runs(tmp_path: Path) -> None:
    g = GraphMaker()
    g.node("Mul", "x", "factor", output="y")
    model = g.model({"x": ["batch", 4], "factor": []}, {"y": ["batch", 4]})
    plan = build(save(model, tmp_path / "m.onnx"), tmp_path / "m.plan", QUICK)
    with Engine.load(plan.path) as engine:
        inputs = {"x": np.ones((2, 4), np.float32), "factor": np.float32(3)}
        np.testing.assert_array_equal(engine.infer(inputs)["y"], np.full((2, 4), 3))


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        ("imput", (1, 3, 12, 12), "names input 'imput'; the model has \\['input'\\]"),
        ("input", (1, 3, 12), "does not fit the model's input input float32"),
        ("input", (1, 3, 12, 12, 1), "does not fit"),
        ("input", (1, 1, 12, 12), "does not fit"),
        ("input", (1, 3, 24, 12), "does not fit"),
    ],
)
def test_a_shape_that_does_not_fit_the_model_is_a_usage_error(
    name: str, shapes: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    source = save(block_network(), tmp_path / "m.onnx")
    profile = {name: ShapeRange(min=shapes, opt=shapes, max=shapes)}
    with pytest.raises(UsageError, match=message) as caught:
        build(source, tmp_path / "m.plan", BuildConfig(profiles=(profile,), timing_rounds=1))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "m.plan").exists()


def test_a_range_over_a_fixed_size_is_a_usage_error(tmp_path: Path) -> None:
    source = save(doubling((2, 4)), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="does not fit"):
        build(
            source, tmp_path / "m.plan", BuildConfig(profiles=({"x": ShapeRange(min=(1, 4), opt=(2, 4), max=(2, 4))},))
        )


@pytest.mark.parametrize(
    ("runtime", "module", "title"),
    [("tensorrt", "tensorrt", "TensorRT"), ("tensorrt-rtx", "tensorrt_rtx", "TensorRT-RTX")],
)
def test_a_runtime_that_is_not_installed_is_named_before_anything_is_read(
    runtime: Any, module: str, title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeUnavailableError, match=f"{title} is not installed") as caught:
        build(tmp_path / "none.onnx", tmp_path / "m.plan", BuildConfig(runtime=runtime))
    assert caught.value.exit_code == 3


def test_a_ledger_that_cannot_be_read_fails_before_the_build(tmp_path: Path) -> None:
    source = save(doubling(), tmp_path / "m.onnx")
    (tmp_path / "ledger.json").write_text("{")
    with pytest.raises(LedgerError):
        build(source, tmp_path / "m.plan", QUICK, ledger=tmp_path / "ledger.json")
    assert not (tmp_path / "m.plan").exists()


def test_a_full_disk_leaves_the_earlier_plan_and_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(doubling(), tmp_path / "m.onnx")
    plan = build(source, tmp_path / "m.plan", QUICK)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save(doubling(("batch", 7)), source)
    before["m.onnx"] = source.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BuildError, match=r"m\.plan cannot be written: .*No space left") as caught:
            build(source, plan.path, QUICK)
    assert caught.value.exit_code == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    Engine.load(plan.path).close()


def test_an_output_that_is_a_folder_is_a_build_error(tmp_path: Path) -> None:
    (tmp_path / "m.plan").mkdir()
    with pytest.raises(BuildError, match="cannot be written"):
        build(save(doubling(), tmp_path / "m.onnx"), tmp_path / "m.plan", QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.plan"]


def test_the_folder_of_the_output_is_made(tmp_path: Path) -> None:
    plan = build(save(doubling(), tmp_path / "m.onnx"), tmp_path / "new" / "folder" / "m.plan", QUICK)
    Engine.load(plan.path).close()


# loading


def test_a_truncated_plan_is_corrupt(plan: Path) -> None:
    content = plan.read_bytes()
    for size in (0, 1, len(content) // 2, len(content) - 1):
        plan.write_bytes(content[:size])
        with pytest.raises(PlanCorruptError, match=f"{size} bytes"):
            Engine.load(plan)


def test_one_changed_byte_is_corrupt(plan: Path) -> None:
    content = bytearray(plan.read_bytes())
    for position in (0, len(content) // 2, len(content) - 1):
        content[position] ^= 1
        plan.write_bytes(content)
        with pytest.raises(PlanCorruptError, match="SHA-256") as caught:
            Engine.load(plan)
        assert caught.value.exit_code == 2
        content[position] ^= 1


def test_the_manifest_of_another_plan_is_corrupt(plan: Path, tmp_path: Path) -> None:
    other = build(save(doubling(), tmp_path / "m.onnx"), tmp_path / "m.plan", QUICK)
    shutil.copy(manifest_path(other.path), manifest_path(plan))
    with pytest.raises(PlanCorruptError, match="not the one that its manifest describes"):
        Engine.load(plan)


def test_a_missing_manifest_or_plan_is_corrupt(plan: Path) -> None:
    manifest_path(plan).unlink()
    with pytest.raises(PlanCorruptError, match="manifest"):
        Engine.load(plan)
    plan.unlink()
    with pytest.raises(PlanCorruptError, match="no plan"):
        Engine.load(plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["runtime"].update(version="1.2.3"), "ONNX Runtime 1.2.3"),
        (lambda m: m["device"].update(capability="x86_64+avx9000"), "avx9000"),
        (lambda m: m["device"].update(capability="pdp11"), "pdp11"),
        (lambda m: m["device"].update(kind="gpu", name="H100", capability="9.0"), "H100"),
    ],
    ids=["version", "instruction-sets", "architecture", "gpu"],
)
def test_a_plan_of_another_version_or_machine_is_refused_before_its_bytes_are_read(
    change: Callable[[dict[str, Any]], None], message: str, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_manifest(plan, change)
    plan.write_bytes(b"never read")
    monkeypatch.setattr(ort_runtime, "make_session", lambda *_, **__: pytest.fail("bytes reached the runtime"))
    with pytest.raises(PlanIncompatibleError, match=message) as caught:
        Engine.load(plan)
    assert caught.value.exit_code == 3
    assert "trtdeploy build classifier.onnx" in str(caught.value)


def test_the_same_instruction_sets_or_their_architecture_alone_are_accepted(plan: Path) -> None:
    for capability in (instruction_sets(), instruction_sets().split("+")[0]):
        edit_manifest(plan, lambda m, capability=capability: m["device"].update(capability=capability))
        Engine.load(plan).close()


def test_a_plan_of_another_runtime_says_which(plan: Path) -> None:
    edit_manifest(plan, lambda m: m["runtime"].update(name="tensorrt"))
    with pytest.raises(RuntimeUnavailableError, match="'tensorrt'"):
        Engine.load(plan)


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing manifest", "foreign manifest"])
def test_no_damaged_byte_reaches_the_runtime(
    damage: str, plan: Path, qdq_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    real = make_session
    monkeypatch.setattr(ort_runtime, "make_session", lambda content, **o: seen.append(content) or real(content, **o))
    Engine.load(qdq_plan.path).close()
    assert seen == [qdq_plan.path.read_bytes()], "the spy must see a good plan"
    if damage == "truncated":
        os.truncate(plan, 100)
    elif damage == "changed":
        put(plan, plan.read_bytes())
        plan.write_bytes(plan.read_bytes()[:-1] + b"\x00")
    elif damage == "missing manifest":
        manifest_path(plan).unlink()
    else:
        edit_manifest(plan, lambda m: m.update(plan_sha256="0" * 64))
    with pytest.raises(PlanCorruptError):
        Engine.load(plan)
    assert len(seen) == 1


def test_files_that_are_replaced_while_they_are_loaded_are_checked_again(
    plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the manifest and reading the bytes, a publisher puts a plan of another version there."""
    real = read_plan

    def replaced(path: Path) -> Any:
        edit_manifest(path, lambda m: m["runtime"].update(version="1.2.3"))
        return real(path)

    monkeypatch.setattr(sys.modules[Engine.__module__], "read_plan", replaced)
    monkeypatch.setattr(ort_runtime, "make_session", lambda *_, **__: pytest.fail("bytes reached the runtime"))
    with pytest.raises(PlanIncompatibleError, match=r"1\.2\.3"):
        Engine.load(plan)


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, bytes(1000), b"\x08\x09"])
def test_garbage_with_a_manifest_that_agrees_is_corrupt(content: bytes, plan: Path) -> None:
    put(plan, content)
    with pytest.raises(PlanCorruptError, match="cannot load the plan"):
        Engine.load(plan)


def test_a_plan_with_an_operator_that_is_unknown_here_is_corrupt(plan: Path) -> None:
    g = GraphMaker()
    g.node("NoSuchOperator", "input", output="logits")
    put(plan, g.model({"input": ["n", 3, 32, 32]}, {"logits": ["n", 10]}).SerializeToString())
    with pytest.raises(PlanCorruptError, match="NoSuchOperator"):
        Engine.load(plan)


@given(st.binary(max_size=200))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_with_a_manifest_that_agrees_are_a_plan_error(plan: Path, content: bytes) -> None:
    put(plan, content)
    with pytest.raises(PlanError):
        Engine.load(plan)


def test_arguments_out_of_range_are_usage_errors(plan: Path) -> None:
    for options in (
        {"contexts": 0},
        {"threads": 0},
        {"queue_size": -1},
        {"timeout_s": -1.0},
        {"timeout_s": float("nan")},
    ):
        with pytest.raises(UsageError, match=f"{next(iter(options))}="):
            Engine.load(plan, **options)  # type: ignore[arg-type]


def test_threads_are_divided_among_contexts_unless_they_are_given(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    real = make_session

    def spy(content: bytes, *, threads: int) -> Any:
        used.append(threads)
        return real(content, threads=threads)

    monkeypatch.setattr(ort_runtime, "make_session", spy)
    edit_manifest(plan, lambda m: m["tactic"].update(threads=4))
    for contexts, threads in ((1, None), (2, None), (3, None), (8, None), (8, 2)):
        Engine.load(plan, contexts=contexts, threads=threads).close()
    assert used == [4, 2, 1, 1, 2]


def test_a_profile_limits_what_the_loaded_plan_takes(tmp_path: Path) -> None:
    source = save(block_network(), tmp_path / "m.onnx")
    config = BuildConfig(profiles=(batch_profile("input", 4, 3, 12, 12),), timing_rounds=1)
    with Engine.load(build(source, tmp_path / "m.plan", config).path) as engine:
        engine.infer({"input": np.zeros((4, 3, 12, 12), np.float32)})
        with pytest.raises(trtdeploy.errors.ShapeError, match="no profile"):
            engine.infer({"input": np.zeros((5, 3, 12, 12), np.float32)})


def external(folder: Path) -> Path:
    """Write a model whose weights lie in ``w.bin``."""
    path = folder / "m.onnx"
    model = block_network(quantized=False)
    onnx.save_model(model, str(path), save_as_external_data=True, location="w.bin", size_threshold=0)
    return path


@pytest.mark.parametrize(
    ("output", "cache"),
    [
        ("m.onnx", None),
        ("w.bin", None),
        ("r", None),  # its manifest would be r.json
        ("settings", None),  # beside it lies settings.json
        ("p.plan", "m.onnx"),
        ("p.plan", "w.bin"),
        ("p.plan", "r.json"),
        ("p.plan", "link"),
        ("p.plan", "p.plan"),
        ("p.plan", "./p.plan"),
        ("p.plan", "p.plan.json"),
        ("p.plan", "calibration.cache"),
        ("p.plan", "settings.json"),
        ("p.plan", "old.plan"),
        ("p.plan", "old.plan.json"),
    ],
)
def test_a_build_writes_over_nothing_that_is_something_else(
    output: str, cache: str | None, tmp_path: Path, qdq_plan: Plan
) -> None:
    model = external(tmp_path)
    (tmp_path / "r.json").write_text(json.dumps({"format": 1, "ranges": {"input": 1.0}}))
    (tmp_path / "settings.json").write_text(json.dumps({"name": "mine"}))
    (tmp_path / "calibration.cache").write_text("TRT-8401-EntropyCalibration2\nx: 3caa54fc\n")
    (tmp_path / "link").symlink_to("m.onnx")
    shutil.copy(qdq_plan.path, tmp_path / "old.plan")
    shutil.copy(manifest_path(qdq_plan.path), tmp_path / "old.plan.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    config = QUICK.model_copy(
        update={"ranges": tmp_path / "r.json", "timing_cache": cache and Path(f"{tmp_path}/{cache}")}
    )
    with pytest.raises((UsageError, TimingCacheError)):
        build(model, tmp_path / output, config)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
