"""What ``trtdeploy/cuda`` calls of CUDA, read from its code; so that no list has to be kept by hand."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import trtdeploy.cuda

FOLDER = Path(trtdeploy.cuda.__file__).parent


@dataclass(frozen=True)
class Call:
    """One call: the function, and how many arguments it is given; or a name that is only read."""

    where: str
    name: str
    arguments: int | None = None


def sources() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(FOLDER.glob("*.py"))}


def calls_in(name: str, source: str) -> Iterator[Call]:
    """Find ``api.call("cudaX", ...)``, ``runtime.cudaX(...)`` and ``runtime.cudaEnum.cudaMember``."""
    tree = ast.parse(source)
    inner = set()
    for node in ast.walk(tree):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "call" and node.args and isinstance(node.args[0], ast.Constant):
                if any(isinstance(argument, ast.Starred) for argument in node.args):
                    raise AssertionError(f"{where}: the arguments of a call of CUDA must be written out")
                yield Call(where, str(node.args[0].value), len(node.args) - 1)
            elif _of_runtime(node.func):
                inner.add(id(node.func))
                yield Call(where, node.func.attr, len(node.args))
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            if isinstance(node.value, ast.Attribute) and _of_runtime(node.value) and node.attr.startswith("cuda"):
                inner.add(id(node.value))
                yield Call(where, f"{node.value.attr}.{node.attr}")
            elif _of_runtime(node):
                yield Call(where, node.attr)


def _of_runtime(node: ast.Attribute) -> bool:
    """Say whether this is ``runtime.cudaX`` or ``self.runtime.cudaX``."""
    owner = node.value
    name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
    return node.attr.startswith("cuda") and name == "runtime"


def defects(calls: list[Call], runtime: ModuleType | Any) -> list[str]:
    """Return what a runtime module lacks, or takes with another number of arguments."""
    found = []
    for call in calls:
        value: Any = runtime
        for part in call.name.split("."):
            value = getattr(value, part, None)
        if value is None:
            found.append(f"{call.where}: there is no {call.name}")
        elif call.arguments is not None and not _takes(value, call.arguments):
            found.append(f"{call.where}: {call.name} is given {call.arguments} arguments")
    return found


def _takes(function: Any, count: int) -> bool:
    if inspect.isclass(function):  # a structure, made empty
        return count == 0
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    return True
