"""What ``trtdeploy.runtimes.tensorrt`` uses of TensorRT's bindings exists in each version, or stands behind a probe.

The uses are collected from the code: mypy checks it against typed stubs that are made from the real bindings. That no
use escapes mypy is proved by renaming each one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.contract.contract import PROJECT, Checker, Sources, members_of, names_in
from tests.contract.real_bindings import VERSIONS, Stubs


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources.of_package(PROJECT, "trtdeploy")


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Checker:
    return Checker(tmp_path_factory.mktemp("contract"), PROJECT / "trtdeploy")


def test_the_product_uses_the_bindings(sources: Sources) -> None:
    assert {path.parent.as_posix() for path in sources.texts} >= {"trtdeploy/runtimes/tensorrt"}


def test_what_the_code_uses_exists_or_is_probed(sources: Sources, checker: Checker, stubs: Stubs) -> None:
    violations = checker.violations(sources, stubs)
    assert not violations, f"{stubs.version}:\n" + "\n".join(map(str, violations))


def test_every_renamed_use_is_noticed(sources: Sources, checker: Checker, all_stubs: list[Stubs]) -> None:
    uses = sources.uses(set().union(*(names_in(stubs.text) for stubs in all_stubs)))
    assert len(uses) > 100
    undetected = {stubs.version: checker.undetected(sources, stubs, uses) for stubs in all_stubs}
    nowhere = set.intersection(*map(set, undetected.values()))
    assert not nowhere, "a typo here would go unseen:\n" + "\n".join(map(str, nowhere))
    for stubs in all_stubs:
        # A version that lacks what a probe asks for cannot tell what would have come of it; the others do.
        names = names_in(stubs.text)
        probing = {scope for _, name, scope in sources.probes() if name not in names}
        unchecked = [use for use in undetected[stubs.version] if use.scope not in probing]
        assert not unchecked, f"unseen by {stubs.version}, and no probe there:\n" + "\n".join(map(str, unchecked))


def test_probes_ask_for_names_that_exist_somewhere(sources: Sources, all_stubs: list[Stubs]) -> None:
    known = set().union(*(names_in(stubs.text) for stubs in all_stubs)) | sources.definitions()
    wrong = [f"{place}: {name or 'no constant'}" for place, name, _ in sources.probes() if name not in known]
    assert not wrong


def test_enum_members_named_in_text_exist(sources: Sources, all_stubs: list[Stubs]) -> None:
    known = set().union(*(names_in(stubs.text) for stubs in all_stubs))
    assert not [f"{place}: {word}" for place, word in sources.words() if word not in known]


def test_callbacks_override_what_the_base_has(sources: Sources, stubs: Stubs) -> None:
    members = members_of(stubs.text)
    overrides = list(sources.overrides())
    assert {base for _, base, _ in overrides} >= {"ILogger", "IProgressMonitor", "IOutputAllocator"}
    assert not [f"{place}: {base}.{name}" for place, base, name in overrides if name not in members[base]]


def test_no_attribute_of_a_bare_module_object() -> None:
    files = (PROJECT / "trtdeploy").rglob("*.py")
    everywhere = Sources({path.relative_to(PROJECT): path.read_bytes() for path in files})
    assert not list(everywhere.untyped_module_uses())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("build_serialized_network(", "build_serialised_network("),
        ("ignore_mismatch=", "ignore_mismatches="),
        ("BuilderFlag.TF32", "BuilderFlag.TF_32"),
        ("MemoryPoolType.WORKSPACE", "MemoryPoolType.WORK_SPACE"),
        ("num_io_tensors", "num_bindings"),
        ("trt.OnnxParser(", "trt.OnnxReader("),
    ],
)
def test_one_renamed_use_is_noticed(
    sources: Sources, checker: Checker, stubs_of: Callable[[str], Stubs], old: str, new: str
) -> None:
    wrong_name = new.strip("(=").rpartition(".")[2]
    findings = checker.findings(sources.edited(old, new), stubs_of(VERSIONS[-1]))
    assert any(wrong_name in finding.message for finding in findings), findings


def test_a_renamed_callback_is_noticed(sources: Sources, stubs: Stubs) -> None:
    members = members_of(stubs.text)
    for name in ("log", "step_complete", "reallocate_output_async"):
        renamed = sources.edited(f"def {name}(", f"def {name}_(")
        assert [method for _, base, method in renamed.overrides() if method not in members[base]] == [f"{name}_"]
