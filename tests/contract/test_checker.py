"""The checker of the contract itself: it accepts a right sample and catches each kind of wrong one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract.contract import Checker, Sources, members_of, names_in
from tests.contract.fetch_bindings import fetch, wheel_in
from tests.contract.real_bindings import VERSIONS, Stubs

SAMPLE = """
from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorrt


def build(module: ModuleType, content: bytes) -> bytes:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = module

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            print(int(severity), msg)

    builder = trt.Builder(Log())
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, Log())
    if not parser.parse(content):
        raise RuntimeError(parser.get_error(0).desc())
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.REFIT)
    if hasattr(trt.BuilderFlag, "INT8"):
        config.set_flag(trt.BuilderFlag.INT8)
    config.set_memory_pool_limit(pool=trt.MemoryPoolType.WORKSPACE, pool_size=1 << 20)
    shape = tuple(int(size) for size in network.get_input(0).shape)
    print(shape)
    return bytes(builder.build_serialized_network(network, config))
"""
PATH = Path("sample.py")


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Checker:
    return Checker(tmp_path_factory.mktemp("checker"))


@pytest.fixture
def newest(stubs_of: Callable[[str], Stubs]) -> Stubs:
    return stubs_of(VERSIONS[-1])


@pytest.fixture
def sample() -> Sources:
    return Sources({PATH: SAMPLE.encode()})


def test_a_right_sample_passes(checker: Checker, sample: Sources, newest: Stubs) -> None:
    assert checker.violations(sample, newest) == []
    uses = sample.uses(names_in(newest.text))
    assert {"create_network", "STRONGLY_TYPED", "get_error", "desc", "shape", "pool_size"} <= {use.name for use in uses}
    # this version has no INT8, so what stands behind the probe has no type
    assert [str(use) for use in checker.undetected(sample, newest, uses) if use.name != "INT8"] == []


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("create_builder_config()", "make_builder_config()", "attr-defined"),
        ("create_network(1", "create_network(flag=1", "call-arg"),
        ("BuilderFlag.REFIT", "BuilderFlag.FP16", "attr-defined"),
        ("network.get_input(0).shape", "network.get_input(0).dims", "attr-defined"),
        ("parser.get_error(0).desc()", "parser.get_error(0).text()", "attr-defined"),
        ("parser.parse(content)", "parser.parse(content, None, 1)", "call-arg"),
        ('if hasattr(trt.BuilderFlag, "INT8"):', "if True:", "attr-defined"),
        ('hasattr(trt.BuilderFlag, "INT8")', 'hasattr(trt.BuilderFlag, "FP8")', "attr-defined"),
        ("severity: trt.ILogger.Severity, msg: str", "severity: trt.ILogger.Severity", "override"),
        ("bytes(builder.build_serialized_network(network, config))", "bytes(builder)", "call-overload"),
    ],
)
def test_each_kind_of_mistake_is_found(
    checker: Checker, sample: Sources, newest: Stubs, old: str, new: str, code: str
) -> None:
    assert code in {finding.code for finding in checker.violations(sample.edited(old, new), newest)}


def test_a_probe_for_a_name_that_no_version_has_is_found(sample: Sources, newest: Stubs) -> None:
    known = names_in(newest.text) | {"INT8"}
    assert {name for _, name, _ in sample.probes()} <= known
    assert {name for _, name, _ in sample.edited('"INT8"', '"INT_8"').probes()} - known == {"INT_8"}
    assert [name for _, name, _ in sample.edited('"INT8"', "content.decode()").probes()] == [None]


def test_an_untyped_use_is_found(checker: Checker, sample: Sources, newest: Stubs) -> None:
    hidden = sample.edited("network = builder", "network: Any = builder")
    undetected = checker.undetected(hidden, newest, hidden.uses(names_in(newest.text)))
    assert {use.name for use in undetected} - {"INT8"} == {"get_input", "shape"}


def test_a_use_of_the_bare_module_is_found(sample: Sources) -> None:
    assert not list(sample.untyped_module_uses())
    for used in ("module.Builder(", "self.bindings.trt.Builder("):
        assert list(sample.edited("trt.Builder(", used).untyped_module_uses())


def test_a_misspelt_callback_is_found(sample: Sources, newest: Stubs) -> None:
    members = members_of(newest.text)
    for texts, expected in ((sample, []), (sample.edited("def log(", "def report("), ["report"])):
        assert [name for _, base, name in texts.overrides() if name not in members[base]] == expected


def test_callbacks_that_only_a_docstring_shows_are_known(newest: Stubs) -> None:
    assert {"reallocate_output_async", "notify_shape"} <= members_of(newest.text)["IOutputAllocator"]


def test_only_what_is_missing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for version in VERSIONS:
        (tmp_path / f"tensorrt_cu13_bindings-{version}-{python}-none-any.whl").touch()
    fetch(tmp_path)
    assert all(wheel_in(tmp_path, version) for version in VERSIONS)
    assert wheel_in(tmp_path, "10.16.1") is None


def test_a_failed_fetch_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    script = Path(__file__).with_name("fetch_bindings.py")
    process = subprocess.run(
        [sys.executable, script, tmp_path / "new"],
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert "pip ended with" in process.stderr
    assert list((tmp_path / "new").iterdir()) == []
