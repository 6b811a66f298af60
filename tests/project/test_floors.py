"""The order of floors: no import runs upward and none in a circle, inside functions and under TYPE_CHECKING too."""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the ground up. A module belongs to the longest name that it begins with, and imports from its own floor and from
# those below it. A new room gets its place here.
FLOORS = [
    "trtdeploy.version",
    "trtdeploy.errors",
    "trtdeploy.module_command",
    "trtdeploy.counting",
    "trtdeploy.frozen_model",
    "trtdeploy.yaml_options",
    "trtdeploy.file_format",
    "trtdeploy.files",
    "trtdeploy.tensors",
    "trtdeploy.statistics",
    "trtdeploy.calibration",
    "trtdeploy.cuda",
    "trtdeploy.data",
    "trtdeploy.ledger",
    "trtdeploy.plan",
    "trtdeploy.timing_cache",
    "trtdeploy.runtimes.config",
    "trtdeploy.onnxgraph",
    "trtdeploy.runtimes.trial_inputs",
    "trtdeploy.runtimes.base",
    "trtdeploy.runtimes.onnxruntime",
    "trtdeploy.runtimes.tensorrt",
    "trtdeploy.runtimes",
    "trtdeploy.building",
    "trtdeploy.engine",
    "trtdeploy.quantizing",
    "trtdeploy.validation",
    "trtdeploy.triton.backend",
    "trtdeploy.triton.config",
    "trtdeploy.triton.client",
    "trtdeploy.triton.repository",
    "trtdeploy.triton.server",
    "trtdeploy.triton.targets",
    "trtdeploy.triton.pipeline",
    "trtdeploy.triton",
    "trtdeploy.load",
    "trtdeploy.doctor",
    "trtdeploy.report",
    "trtdeploy.quickstart",
    "trtdeploy",
    "trtdeploy.triton.backend.model",
    "trtdeploy.triton.backend.preprocess_model",
    "trtdeploy.cli",
    "training.models",
    "training.quantization",
    "training.predict",
    "training.checkpoints",
    "training.loop",
    "training.ptq",
    "training.recording",
    "training.parity",
    "training.onnx_export",
    "training.qat",
    "training.sensitivity",
    "training.auto",
    "training",
    "training.cli",
    "training.__main__",
    "trtdeploy.cli.train",
    "trtdeploy.cli.main",
    "trtdeploy.__main__",
]


def modules(root: Path) -> dict[str, Path]:
    """Return every module of the two packages by its name."""
    found = {}
    for package in ("trtdeploy", "training"):
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imported(source: str, known: Container[str]) -> Iterator[str]:
    """Yield the modules of ours that a source imports, wherever in it, and however."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in known:
                    yield name
                elif node.module in known:
                    yield str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            yield from (
                argument.value
                for argument in node.args
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str) and argument.value in known
            )


def graph(root: Path) -> dict[str, set[str]]:
    """Return what each module imports."""
    known = modules(root)
    return {name: set(imported(path.read_text(), known)) - {name} for name, path in known.items()}


def floor_of(module: str) -> int:
    """Return how far up a module is."""
    rooms = [room for room in FLOORS if f"{module}.".startswith(f"{room}.")]
    return FLOORS.index(max(rooms, key=len))


def upward(imports: dict[str, set[str]]) -> list[str]:
    """Return the imports that run upward."""
    return [
        f"{module} imports {target}"
        for module, targets in imports.items()
        for target in sorted(targets)
        if floor_of(target) > floor_of(module)
    ]


IMPORTS = graph(ROOT)


def test_no_import_runs_upward() -> None:
    assert upward(IMPORTS) == []


def test_no_import_runs_in_a_circle() -> None:
    TopologicalSorter(IMPORTS).prepare()


def test_every_floor_is_a_room_that_is_there() -> None:
    """The root package is a room of its own: what lies in it has a floor that is named."""
    assert [room for room in FLOORS if room not in IMPORTS] == []
    assert len(set(FLOORS)) == len(FLOORS)
    assert [module for module in IMPORTS if module != "trtdeploy" and FLOORS[floor_of(module)] == "trtdeploy"] == []


def test_one_door_alone_leads_to_training() -> None:
    doors = [
        module
        for module, targets in IMPORTS.items()
        if module.startswith("trtdeploy") and any(target.split(".")[0] == "training" for target in targets)
    ]
    assert doors == ["trtdeploy.cli.train"]


def test_torch_lives_in_training_alone() -> None:
    importing = [
        name
        for name, path in modules(ROOT).items()
        if name.startswith("trtdeploy") and "torch" in imported(path.read_text(), {"torch"})
    ]
    # asking which version is installed, in a process of its own
    assert importing == ["trtdeploy.doctor.probe"]


@pytest.mark.parametrize(
    "source",
    [
        "from trtdeploy.engine import Engine",
        "import trtdeploy.engine",
        "from trtdeploy import engine",
        "def f():\n    from trtdeploy.engine import Engine",
        "if TYPE_CHECKING:\n    from trtdeploy.engine import Engine",
        "importlib.import_module('trtdeploy.engine')",
    ],
)
def test_every_way_to_import_is_seen(source: str) -> None:
    found = set(imported(source, modules(ROOT))) - {"trtdeploy"}
    assert found == {"trtdeploy.engine"}
    assert upward({"trtdeploy.plan": found}) == ["trtdeploy.plan imports trtdeploy.engine"]
    assert upward({"trtdeploy.cli.plans": found}) == []


def test_a_circle_is_seen() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()
