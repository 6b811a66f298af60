from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import PlanCorruptError
from trtdeploy.files import sha256_bytes
from trtdeploy.plan import (
    DeviceFacts,
    Manifest,
    PrecisionFacts,
    RuntimeFacts,
    SourceFacts,
    TacticFacts,
    manifest_path,
    read_manifest,
    read_plan,
    write_plan,
)
from trtdeploy.tensors import ShapeRange, TensorSpec

CONTENT = bytes(range(256)) * 20


def manifest(content: bytes = CONTENT, **changes: Any) -> Manifest:
    """A manifest with every optional part present."""
    facts: dict[str, Any] = {
        "trtdeploy_version": "0.1.0",
        "created_at": "2025-01-01T00:00:00+00:00",
        "runtime": RuntimeFacts(name="onnxruntime", version="1.20.0"),
        "device": DeviceFacts(kind="cpu", name="Prozessor für alles", capability="avx2"),
        "inputs": (TensorSpec(name="input", dtype="float32", shape=(-1, 3, 8, 8)),),
        "outputs": (TensorSpec(name="logits", dtype="float32", shape=(-1, 10)),),
        "profiles": ({"input": ShapeRange(min=(1, 3, 8, 8), opt=(4, 3, 8, 8), max=(8, 3, 8, 8))},),
        "precision": PrecisionFacts(weighted_layers=3, quantized_layers=2, integer_kernels=None, note="counted"),
        "tactic": TacticFacts(name="folded", threads=2, milliseconds={"folded": 1.5, "fused": 2.25}),
        "plan_bytes": len(content),
        "plan_sha256": sha256_bytes(content),
        "onnx": SourceFacts(file="b0.onnx", sha256="0" * 64),
        "build_config": {"shapes": ["input=1x3x8x8"], "workspace_bytes": None},
        "preprocessing": Preprocessing.square(8),
        "labels": ("cat", "dog"),
        "calibration": {"method": "entropy"},
        "ledger": {"float": {"n": 10, "top1": 90.0}},
        **changes,
    }
    return Manifest(**facts)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return write_plan(tmp_path / "b0.plan", CONTENT, manifest()).path


def test_a_plan_reads_back_byte_for_byte_with_its_manifest(plan: Path) -> None:
    assert read_plan(plan) == (CONTENT, manifest())
    assert read_plan(str(plan)) == (CONTENT, manifest())
    assert read_manifest(plan) == manifest()


def test_on_disk_are_the_runtimes_own_bytes_and_a_json_file_beside_them(plan: Path) -> None:
    assert plan.read_bytes() == CONTENT
    assert manifest_path(plan) == plan.parent / "b0.plan.json"
    assert json.loads(manifest_path(plan).read_text(encoding="utf-8"))["plan_sha256"] == sha256_bytes(CONTENT)
    assert {path.name for path in plan.parent.iterdir()} == {"b0.plan", "b0.plan.json"}


def test_a_manifest_of_nothing_but_the_required_parts_round_trips(tmp_path: Path) -> None:
    facts = manifest(b"", profiles=(), tactic=None, preprocessing=None, labels=None, calibration=None, ledger=None)
    write_plan(tmp_path / "empty.plan", b"", facts)
    assert read_plan(tmp_path / "empty.plan") == (b"", facts)


def test_a_new_plan_replaces_plan_and_manifest(plan: Path) -> None:
    write_plan(plan, b"second", manifest(b"second"))
    assert read_plan(plan)[0] == b"second"


@pytest.mark.parametrize("size", [0, 1, len(CONTENT) // 2, len(CONTENT) - 1])
def test_a_truncated_plan_is_refused_with_both_sizes(plan: Path, size: int) -> None:
    plan.write_bytes(CONTENT[:size])
    with pytest.raises(PlanCorruptError, match=f"{size} bytes .* expected {len(CONTENT)} bytes") as caught:
        read_plan(plan)
    assert str(plan) in caught.value.message


@pytest.mark.parametrize("position", [0, 1000, len(CONTENT) - 1])
@pytest.mark.parametrize("bit", [1, 128])
def test_one_changed_bit_is_noticed(plan: Path, position: int, bit: int) -> None:
    changed = bytearray(CONTENT)
    changed[position] ^= bit
    plan.write_bytes(changed)
    with pytest.raises(PlanCorruptError, match="not the one that its manifest describes"):
        read_plan(plan)


def test_appended_bytes_are_noticed(plan: Path) -> None:
    plan.write_bytes(CONTENT + b"\0")
    with pytest.raises(PlanCorruptError, match="not the one that its manifest describes"):
        read_plan(plan)


def test_a_missing_plan_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(PlanCorruptError, match=r"no plan at .*b0\.plan") as caught:
        read_plan(tmp_path / "b0.plan")
    assert "trtdeploy build" in str(caught.value)


def test_a_folder_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanCorruptError, match="no plan at"):
        read_plan(tmp_path)


def test_a_missing_manifest_is_named(plan: Path) -> None:
    manifest_path(plan).unlink()
    with pytest.raises(PlanCorruptError, match=r"no readable manifest b0\.plan\.json") as caught:
        read_plan(plan)
    assert "manifest" in (caught.value.hint or "")


def test_the_manifest_of_another_plan_is_noticed_even_when_the_size_is_the_same(plan: Path, tmp_path: Path) -> None:
    other = write_plan(tmp_path / "other.plan", CONTENT[::-1], manifest(CONTENT[::-1])).path
    manifest_path(plan).write_bytes(manifest_path(other).read_bytes())
    with pytest.raises(PlanCorruptError, match="mixed up") as caught:
        read_plan(plan)
    assert sha256_bytes(CONTENT)[:16] in caught.value.message
    assert sha256_bytes(CONTENT[::-1])[:16] in caught.value.message


def test_a_kill_between_the_two_files_is_noticed(plan: Path) -> None:
    old_manifest = manifest_path(plan).read_bytes()
    write_plan(plan, b"new plan", manifest(b"new plan"))
    manifest_path(plan).write_bytes(old_manifest)
    with pytest.raises(PlanCorruptError, match="not the one that its manifest describes"):
        read_plan(plan)


def test_a_manifest_cut_anywhere_is_refused(plan: Path) -> None:
    content = manifest_path(plan).read_bytes()
    assert content.endswith(b"}\n")
    for end in range(0, len(content) - 1, 3):
        manifest_path(plan).write_bytes(content[:end])
        with pytest.raises(PlanCorruptError, match=r"b0\.plan\.json"):
            read_plan(plan)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"null", b"[]", b"{}", b"{'a': 1}"])
def test_a_file_that_is_no_manifest_is_refused(plan: Path, content: bytes) -> None:
    manifest_path(plan).write_bytes(content)
    with pytest.raises(PlanCorruptError, match="manifest") as caught:
        read_plan(plan)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["preprocessing", "gamma"], 2.2),
        (["format"], 0),
        (["runtime", "name"], "tflite"),
        (["inputs", 0, "dtype"], "float8"),
        (["tactic", "milliseconds", "folded"], float("nan")),
        (["profiles", 0, "input", "min"], [9, 3, 8, 8]),
        (["profile_values"], [{}, {}]),
        (["plan_bytes"], "all"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, list) and value else None,
)
def test_a_manifest_with_impossible_values_is_refused(plan: Path, path: list[Any], value: Any) -> None:
    content = json.loads(manifest_path(plan).read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    manifest_path(plan).write_text(json.dumps(content))
    with pytest.raises(PlanCorruptError, match="not a manifest of this version") as caught:
        read_manifest(plan)
    assert str(path[-1]) in caught.value.message or str(path[-2]) in caught.value.message


def test_a_manifest_cannot_be_changed_in_memory() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        manifest().plan_sha256 = "0" * 64


def test_full_disk_leaves_both_files_as_they_were(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {entry.name: entry.read_bytes() for entry in plan.parent.iterdir()}
    synced: list[int] = []
    real_fsync = os.fsync

    def fsync_until_full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:  # the manifest is on disk, the plan is not
            raise OSError(errno.ENOSPC, "No space left on device")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_until_full)
    other = CONTENT + b"more"
    with pytest.raises(OSError, match="No space left"):
        write_plan(plan, other, manifest(other))
    assert {entry.name: entry.read_bytes() for entry in plan.parent.iterdir()} == before
