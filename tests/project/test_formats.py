"""Files of other versions of trtdeploy: a golden file of every version is read, newer ones are read or named."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from training.checkpoints.checkpoint import METADATA_KEY, CheckpointFacts, split_seed_of
from trtdeploy.building.cache_files import cache_facts
from trtdeploy.errors import (
    CheckpointError,
    LedgerError,
    PlanCorruptError,
    PlanIncompatibleError,
    RepositoryError,
    TimingCacheError,
    TrtDeployError,
)
from trtdeploy.file_format import FileFormat
from trtdeploy.ledger.ledger import Ledger, _LedgerFile
from trtdeploy.plan import Manifest, read_manifest
from trtdeploy.timing_cache.measured import MeasuredTimings, TimingCache
from trtdeploy.timing_cache.sidecar import Sidecar, read_pair
from trtdeploy.triton.repository.history import HISTORY_FILE, History, read_history, write_history

GOLDEN = Path(__file__).parents[1] / "golden"
Read = Callable[[Path, str], Any]


def manifest_of(folder: Path, text: str) -> Manifest:
    (folder / "m.plan").write_bytes(b"plan")
    (folder / "m.plan.json").write_text(text)
    return read_manifest(folder / "m.plan")


def stages_of(folder: Path, text: str) -> Any:
    (folder / "ledger.json").write_text(text)
    return Ledger(folder / "ledger.json").stages


def history_of(folder: Path, text: str) -> History:
    (folder / HISTORY_FILE).write_text(text)
    return read_history(folder)


def sidecar_of(folder: Path, text: str) -> Sidecar | None:
    (folder / "b.timing").write_bytes(b"magic one.")
    (folder / "b.timing.json").write_text(text)
    return read_pair(folder / "b.timing")[1]


def timings_of(folder: Path, text: str) -> dict[str, float]:
    (folder / "m.timing").write_text(text)
    return TimingCache(folder / "m.timing").read()


def seed_of(folder: Path, text: str) -> int:
    save_file({"w": np.zeros(1, np.float32)}, folder / "c.safetensors", metadata={METADATA_KEY: text})
    return split_seed_of(folder / "c.safetensors")


FORMATS: dict[str, tuple[type[FileFormat], Read, type[TrtDeployError]]] = {
    "manifest": (Manifest, manifest_of, PlanIncompatibleError),
    "ledger": (_LedgerFile, stages_of, LedgerError),
    "history": (History, history_of, RepositoryError),
    "sidecar": (Sidecar, sidecar_of, TimingCacheError),
    "timings": (MeasuredTimings, timings_of, TimingCacheError),
    "checkpoint": (CheckpointFacts, seed_of, CheckpointError),
}


def golden(name: str, version: str | None = None) -> str:
    major, minor = FORMATS[name][0].current()
    return (GOLDEN / name / f"{version or f'{major}.{minor}'}.json").read_text()


def with_keys(text: str, **keys: Any) -> str:
    return json.dumps({**json.loads(text), **keys})


@pytest.fixture(params=FORMATS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_format_is_here_and_has_a_golden_file_of_its_current_version() -> None:
    assert {kind for kind, _, _ in FORMATS.values()} == set(FileFormat.__subclasses__())
    for name, (kind, _, _) in FORMATS.items():
        major, minor = kind.current()
        assert (GOLDEN / name / f"{major}.{minor}.json").is_file(), name
        written = json.loads(golden(name))
        assert (written["format"], written["minor"]) == (major, minor)
        # the file has what is written today: a key more is a minor version more
        assert set(written) == set(kind.model_fields), name


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*/*.json")), ids=lambda file: f"{file.parent.name} {file.stem}")
def test_golden_files_are_read(file: Path, tmp_path: Path) -> None:
    _, read, _ = FORMATS[file.parent.name]
    assert read(tmp_path, file.read_text())
    assert not list(tmp_path.glob("*corrupt*"))


def test_what_older_manifests_said_of_the_precision_is_read(tmp_path: Path) -> None:
    assert '"int8_macs_percent": 87.5' in golden("manifest", "1.0")
    precision = manifest_of(tmp_path, golden("manifest", "1.0")).precision
    assert (precision.runs_in, precision.unknown_percent) == ({"int8": 87.5}, 12.5)


def test_a_newer_minor_version_is_read_without_what_is_new(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, read, _ = FORMATS[name]
    known = read(tmp_path, golden(name))
    for minor in (1, 7):
        with caplog.at_level(logging.DEBUG, logger="trtdeploy.file_format"):
            for _ in range(2):
                assert read(tmp_path, with_keys(golden(name), minor=minor, **{f"{name}_watts": {"a": [1]}})) == known
        assert caplog.text.count(f"{name}_watts") == 1
    assert {record.levelname for record in caplog.records} == {"DEBUG"}
    assert not list(tmp_path.glob("*corrupt*"))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("manifest", ["runtime"]),
        ("manifest", ["inputs", 0]),
        ("manifest", ["profiles", 0, "x"]),
        ("manifest", ["precision", "layers", "product"]),
        ("ledger", ["stages", "float"]),
        ("ledger", ["stages", "ptq", "against_previous"]),
        ("history", ["versions", "2"]),
        ("history", ["events", 0]),
        ("sidecar", ["fingerprint"]),
        ("checkpoint", ["dataset"]),
    ],
)
def test_new_keys_in_the_parts_are_ignored(name: str, parts: list[Any], tmp_path: Path) -> None:
    _, read, _ = FORMATS[name]
    known = read(tmp_path, golden(name))
    content = json.loads(golden(name))
    place = content
    for part in parts:
        place = place[part]
    place["more"] = [{"a": None}]
    assert read(tmp_path, json.dumps(content)) == known


@pytest.mark.parametrize(("name", "part"), [("manifest", "preprocessing"), ("checkpoint", "quantization")])
def test_nothing_is_ignored_of_what_says_what_is_computed(name: str, part: str, tmp_path: Path) -> None:
    _, read, _ = FORMATS[name]
    content = json.loads(golden(name))
    content[part] = {**(content[part] or {"resize": 8, "crop": [8, 8]}), "gamma": 2.2}
    with pytest.raises(TrtDeployError, match="gamma"):
        read(tmp_path, json.dumps(content))


def test_a_newer_major_version_names_the_version_to_install(name: str, tmp_path: Path) -> None:
    kind, read, error = FORMATS[name]
    writer = {"manifest": "trtdeploy_version", "checkpoint": "version"}.get(name, "written_by")
    with pytest.raises(error, match="reads format 1") as caught:
        read(tmp_path, with_keys(golden(name), format=2, **{writer: "4.5.6"}))
    assert f"{kind.TITLE} of format 2" in caught.value.message
    assert "Install trtdeploy 4.5.6, which wrote it, or a newer version." in str(caught.value.hint)
    assert not list(tmp_path.glob("*corrupt*"))


@pytest.mark.parametrize("text", ['{"format": 2}', '{"format": 99, "anything": []}'])
def test_a_newer_major_version_that_does_not_say_who_wrote_it(text: str, name: str, tmp_path: Path) -> None:
    _, read, error = FORMATS[name]
    with pytest.raises(error, match="Install a newer version of trtdeploy"):
        read(tmp_path, text)
    assert not list(tmp_path.glob("*corrupt*"))


@pytest.mark.parametrize("version", [0, -1, "2", 1.5, None])
def test_another_format_is_damage(version: Any, name: str, tmp_path: Path) -> None:
    kind, _, _ = FORMATS[name]
    with pytest.raises(ValueError, match="format"):
        kind.read(with_keys(golden(name), format=version), tmp_path)


def test_damaged_manifests_stay_damaged_with_new_keys(tmp_path: Path) -> None:
    damaged = with_keys(golden("manifest"), watts=3, plan_bytes="all")
    with pytest.raises(PlanCorruptError, match="plan_bytes") as caught:
        manifest_of(tmp_path, damaged)
    assert caught.value.hint == "Build the plan again."


def test_what_is_written_again_is_of_this_version(tmp_path: Path) -> None:
    history = history_of(tmp_path, with_keys(golden("history"), minor=7, written_by="4.5.6", watts=3))
    write_history(tmp_path, history)
    assert (tmp_path / HISTORY_FILE).read_text() == golden("history")


def test_a_listing_of_caches_names_the_version_to_install(tmp_path: Path) -> None:
    (tmp_path / "m.timing").write_text(with_keys(golden("timings"), format=2, written_by="4.5.6"))
    before = (tmp_path / "m.timing").read_bytes()
    with pytest.raises(TimingCacheError, match=r"Install trtdeploy 4\.5\.6.*Or use another file"):
        cache_facts(tmp_path / "m.timing")
    with pytest.raises(TimingCacheError, match=r"Install trtdeploy 4\.5\.6"):
        TimingCache(tmp_path / "m.timing").merge({"k": 1.0})
    assert (tmp_path / "m.timing").read_bytes() == before
