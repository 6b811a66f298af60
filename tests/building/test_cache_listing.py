"""``cache show`` and ``cache merge``: facts without a runtime, and merging only what belongs together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.onnx_graphs import block_network, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.building.cache_files import cache_facts, merge_caches
from trtdeploy.cli.main import app
from trtdeploy.errors import RuntimeUnavailableError, TimingCacheError
from trtdeploy.timing_cache import BlobCache, Fingerprint, TimingCache

OURS = Fingerprint(kind="timing", runtime="tensorrt", version="10.16.1.11", device="A", capability="8.9", cuda="13.0")


def blob(path: Path, fingerprint: Fingerprint = OURS, content: bytes = b"tactics") -> Path:
    BlobCache(path, fingerprint).merge(content, lambda first, second: first + second, len)
    return path


def test_measured_timings_say_runtime_device_and_count(tmp_path: Path) -> None:
    cache = tmp_path / "b.timing"
    source = save(block_network(channels=8), tmp_path / "m.onnx")
    build(source, tmp_path / "m.plan", BuildConfig(timing_cache=cache, timing_rounds=1, threads=1))
    facts = cache_facts(cache)
    assert (facts.kind, facts.health) == ("onnxruntime timings", "ok")
    assert facts.entries == len(TimingCache(cache).read()) > 0
    assert facts.runtimes[0].startswith("onnxruntime ")
    assert facts.devices


def test_a_blob_says_what_its_sidecar_says(tmp_path: Path) -> None:
    facts = cache_facts(blob(tmp_path / "t.timing"))
    assert (facts.kind, facts.health, facts.entries) == ("timing", "ok", 7)
    assert facts.devices == ("A (cc 8.9)",)


def test_a_blob_that_another_program_rewrote_is_not_called_damaged(tmp_path: Path) -> None:
    path = blob(tmp_path / "t.timing")
    path.write_bytes(b"more tactics")
    facts = cache_facts(path)
    assert (facts.health, facts.entries) == ("changed since its sidecar", None)


@pytest.mark.parametrize(
    ("content", "health"), [(b"", "corrupt"), (b'{"format": 1', "corrupt"), (b"\x93TRT\x00\x01", "no sidecar")]
)
def test_what_has_no_sidecar(tmp_path: Path, content: bytes, health: str) -> None:
    (tmp_path / "x").write_bytes(content)
    assert cache_facts(tmp_path / "x").health == health


def test_merging_measured_timings_keeps_all_and_changes_no_input(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    TimingCache(first).merge({"k1": 1.0, "both": 1.0})
    TimingCache(second).merge({"k2": 2.0, "both": 2.0})
    before = first.read_bytes(), second.read_bytes()
    assert merge_caches([first, second], tmp_path / "out").entries == 3
    assert TimingCache(tmp_path / "out").read() == {"k1": 1.0, "k2": 2.0, "both": 2.0}
    assert (first.read_bytes(), second.read_bytes()) == before


def test_blobs_of_different_machines_are_refused_by_field(tmp_path: Path) -> None:
    first = blob(tmp_path / "a")
    second = blob(tmp_path / "b", OURS.model_copy(update={"capability": "9.0", "version": "11.0.0.114"}))
    with pytest.raises(TimingCacheError, match=r"version '11\.0\.0\.114', expected '10\.16\.1\.11', capability '9\.0'"):
        merge_caches([first, second], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_blob_that_nothing_vouches_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x93TRT")
    with pytest.raises(TimingCacheError, match="no sidecar"):
        merge_caches([tmp_path / "a"], tmp_path / "out")


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    TimingCache(tmp_path / "a").merge({"k": 1.0})
    with pytest.raises(TimingCacheError, match="no sidecar"):
        merge_caches([tmp_path / "a", blob(tmp_path / "b")], tmp_path / "out")


def test_merging_blobs_needs_their_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(RuntimeUnavailableError, match="TensorRT is not installed"):
        merge_caches([blob(tmp_path / "a"), blob(tmp_path / "b")], tmp_path / "out")


class TestCommands:
    def run(self, *arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["cache", *map(str, arguments)])
        return result.exit_code, result.output

    def test_show_prints_facts_and_fails_on_damage(self, tmp_path: Path) -> None:
        TimingCache(tmp_path / "good").merge({"k": 1.0})
        (tmp_path / "bad").write_text("{")
        code, text = self.run("show", tmp_path / "good", "--json")
        assert code == 0
        assert json.loads(text)[0]["entries"] == 1
        code, text = self.run("show", tmp_path / "good", tmp_path / "bad")
        assert code == 1
        assert "corrupt" in text

    def test_show_of_nothing_is_wrong_usage(self, tmp_path: Path) -> None:
        code, text = self.run("show", tmp_path / "none")
        assert code == 2
        assert "cannot be read" in text

    def test_merge_writes_and_says_what(self, tmp_path: Path) -> None:
        TimingCache(tmp_path / "a").merge({"k": 1.0})
        code, text = self.run("merge", tmp_path / "a", "-o", tmp_path / "out")
        assert code == 0
        assert "1 entries" in text
        assert TimingCache(tmp_path / "out").read() == {"k": 1.0}
