"""Holding the product's use of TensorRT's bindings against typed stubs of them, with mypy; and mutating that use."""

from __future__ import annotations

import ast
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.contract.real_bindings import Stubs

PROJECT = Path(__file__).parents[2]
_ERROR = re.compile(
    r"^(?P<path>[^:]+):(?P<line>\d+):(?P<column>\d+): error: (?P<message>.*?)(?:  \[(?P<code>[\w-]+)\])?$"
)
_ANYTHING = "from typing import Any\ndef __getattr__(name: str) -> Any: ...\n"
_MODULES = ("tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class Finding:
    """An error of mypy."""

    path: str
    line: int
    message: str
    code: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message} [{self.code}]"


@dataclass(frozen=True)
class Use:
    """A place where a name of the bindings may be used: an attribute, or a keyword of a call.

    Attributes:
        path: File, relative to the sources.
        line: Where the name is, counted from 1.
        end: Column behind the name, in bytes.
        name: The name.
        scope: Definition at the top of the file that it is in.
        call: Lines of the call, for a keyword.
    """

    path: Path
    line: int
    end: int
    name: str
    scope: str
    call: range | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.name}{'=' if self.call else ''}"


class Sources:
    """Python files that use the bindings, read once: others may be writing them.

    Args:
        texts: What is in them, by path below the folder that holds their package.
    """

    def __init__(self, texts: Mapping[Path, bytes]) -> None:
        self.texts = dict(texts)
        self.trees = {path: ast.parse(text) for path, text in texts.items()}

    @classmethod
    def of_package(cls, root: Path, package: str) -> Sources:
        """Take every file that imports the bindings, and all of the folder that is named after them."""
        files = [path.relative_to(root) for path in (root / package).rglob("*.py")]
        wanted = sorted(path for path in files if path.parent.name == "tensorrt" or _imports_bindings(root / path))
        return cls({path: (root / path).read_bytes() for path in wanted})

    def edited(self, old: str, new: str) -> Sources:
        """Return them with one text in place of another, which must be there."""
        if not any(old.encode() in text for text in self.texts.values()):
            raise ValueError(f"no file contains {old!r}")
        return Sources({path: text.replace(old.encode(), new.encode()) for path, text in self.texts.items()})

    def uses(self, names: set[str]) -> list[Use]:
        """Return every attribute, and every keyword of a method call, whose name is one of these.

        What ``self.x = ...`` defines is no use, nor is what only runs where types are not checked.
        """
        found: list[Use] = []
        for path, tree in self.trees.items():
            for top in tree.body:
                scope = getattr(top, "name", "")
                for node in _checked(top):
                    if isinstance(node, ast.Attribute) and node.attr in names and not _defines(node):
                        found.append(Use(path, node.end_lineno or 0, node.end_col_offset or 0, node.attr, scope))
                    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
                        lines = range(node.lineno, (node.end_lineno or 0) + 1)
                        found += [
                            Use(path, word.lineno, word.col_offset + len(word.arg), word.arg, scope, lines)
                            for word in node.keywords
                            if word.arg in names and word.arg is not None
                        ]
        return found

    def probes(self) -> Iterator[tuple[str, str | None, str]]:
        """Yield (place, name, scope) of every ``hasattr`` and ``getattr``; the name is None if it is no constant."""
        for path, tree in self.trees.items():
            for top in tree.body:
                for node in ast.walk(top):
                    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr"):
                        name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
                        yield f"{path}:{node.lineno}", name, getattr(top, "name", "")

    def definitions(self) -> set[str]:
        """Return the names of everything that these files define."""
        found: set[str] = set()
        for tree in self.trees.values():
            for node in ast.walk(tree):
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                    found.add(node.name)
                elif isinstance(node, ast.Attribute) and _defines(node):
                    found.add(node.attr)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    found.add(node.id)
        return found

    def words(self) -> Iterator[tuple[str, str]]:
        """Yield (place, text) of constants that look like enum members, which the code compares with what prints so.

        What is handed to a function is no such thing: it searches a log, for example.
        """
        for path, tree in self.trees.items():
            calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
            handed_over = {id(argument) for call in calls for argument in call.args}
            for node in ast.walk(tree):
                if not isinstance(node, ast.Constant) or id(node) in handed_over:
                    continue
                if re.fullmatch(r"[A-Z][A-Z0-9_]{2,}", str(node.value)):
                    yield f"{path}:{node.lineno}", str(node.value)

    def overrides(self) -> Iterator[tuple[str, str, str]]:
        """Yield (place, base, method) of the public methods of classes that derive from one of the bindings."""
        for path, tree in self.trees.items():
            for node in ast.walk(tree):
                if not isinstance(node, ast.ClassDef):
                    continue
                bases = [base.attr for base in node.bases if isinstance(base, ast.Attribute) and _is_module(base.value)]
                for method in node.body:
                    if bases and isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        yield f"{path}:{method.lineno}", bases[0], method.name

    def untyped_module_uses(self) -> Iterator[str]:
        """Yield attributes of a module object: no type checker follows them."""
        for path, tree in self.trees.items():
            modules = {
                argument.arg
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef)
                for argument in (*node.args.args, *node.args.kwonlyargs)
                if argument.annotation is not None and "ModuleType" in ast.unparse(argument.annotation)
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and (
                    (isinstance(node.value, ast.Attribute) and node.value.attr == "trt")
                    or (isinstance(node.value, ast.Name) and node.value.id in modules)
                ):
                    yield f"{path}:{node.lineno}: {ast.unparse(node)}"


class Checker:
    """Runs mypy on sources against stubs. Runs share a cache and a folder: what has not changed is not read again.

    Args:
        folder: To work in.
        package: A package to put the sources into; None for sources that stand alone.
    """

    def __init__(self, folder: Path, package: Path | None = None) -> None:
        self._folder = folder
        self._root = folder / "sources"
        self._nothing_known = folder / "anything" / "tensorrt"
        self._nothing_known.mkdir(parents=True)
        (self._nothing_known / "__init__.pyi").write_text(_ANYTHING)
        self._root.mkdir()
        self._changes = itertools.count(1)
        if package is not None:
            for path in (*package.rglob("*.py"), *package.rglob("py.typed")):
                target = self._root / path.relative_to(package.parent)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())

    def violations(self, sources: Sources, stubs: Stubs) -> list[Finding]:
        """Return what mypy says with these stubs and not where nothing is known of the bindings."""
        findings = self.findings(sources, stubs)
        plain = set(self._run(sources, self._nothing_known.parent)) if findings else ()
        return [finding for finding in findings if finding not in plain]

    def findings(self, sources: Sources, stubs: Stubs) -> list[Finding]:
        """Return everything that mypy says with these stubs."""
        self._write(sources.texts)
        return self._run(sources, stubs.folder)

    def undetected(self, sources: Sources, stubs: Stubs, uses: list[Use]) -> list[Use]:
        """Rename every use and return those whose renaming mypy does not report.

        All are renamed at once, each to a name of its own. What follows a renamed one has no type and goes
        unreported; so the unreported are renamed again, alone, until those that remain cannot be reported at all.
        """
        numbered = dict(enumerate(uses))
        while numbered:
            self._write({path: _renamed(text, path, numbered) for path, text in sources.texts.items()})
            findings = self._run(sources, stubs.folder)
            reported = {
                int(number) for finding in findings for number in re.findall(r"_renamed(\d+)\b", finding.message)
            }
            overloads = [finding for finding in findings if finding.code == "call-overload"]
            unseen = {
                number: use
                for number, use in numbered.items()
                if number not in reported
                and not any(use.call and use.path == Path(found.path) and found.line in use.call for found in overloads)
            }
            if len(unseen) == len(numbered):
                break
            numbered = unseen
        return list(numbered.values())

    def _write(self, texts: Mapping[Path, bytes]) -> None:
        for path, text in texts.items():
            target = self._root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() or target.read_bytes() != text:
                target.write_bytes(text)
                # mypy takes a file of the same size and the same second for the same file
                changed_at = 10**9 + next(self._changes)
                os.utime(target, (changed_at, changed_at))

    def _run(self, sources: Sources, stubs: Path) -> list[Finding]:
        command = [sys.executable, "-m", "mypy", "--config-file", str(PROJECT / "pyproject.toml")]
        command += ["--cache-dir", str(self._folder / "cache"), "--follow-imports", "silent", "--no-pretty"]
        command += ["--show-column-numbers", "--no-warn-unused-ignores", "--hide-error-context", "--no-error-summary"]
        process = subprocess.run(
            [*command, *map(str, sources.texts)],
            cwd=self._root,
            env={**os.environ, "MYPYPATH": str(stubs)},
            capture_output=True,
            text=True,
        )
        if process.returncode not in (0, 1):
            raise RuntimeError(f"mypy cannot check:\n{process.stdout}\n{process.stderr}")
        matches = filter(None, map(_ERROR.match, process.stdout.splitlines()))
        findings = [Finding(m["path"], int(m["line"]), m["message"], m["code"] or "") for m in matches]
        return [finding for finding in findings if Path(finding.path) in sources.texts]


def names_in(text: str) -> set[str]:
    """Return every name that a stub gives to something: classes, functions, attributes, arguments."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.AnnAssign):
            found.add(ast.unparse(node.target))
    return found


def members_of(text: str) -> dict[str, set[str]]:
    """Return the names in each class of a stub, its bases' included, and in the module itself under ""."""
    tree = ast.parse(text)
    found: dict[str, set[str]] = {"": {getattr(node, "name", "") for node in tree.body}}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = names_in(ast.unparse(node))
            for base in node.bases:
                found[node.name] |= found.get(ast.unparse(base), set())
    return found


def _renamed(text: bytes, path: Path, numbered: Mapping[int, Use]) -> bytes:
    lines = text.split(b"\n")
    here = [(use.line, use.end, number) for number, use in numbered.items() if use.path == path]
    for line, end, number in sorted(here, key=lambda place: (place[0], -place[1])):
        lines[line - 1] = lines[line - 1][:end] + b"_renamed%d" % number + lines[line - 1][end:]
    return b"\n".join(lines)


def _checked(top: ast.AST) -> Iterator[ast.AST]:
    """Walk what a type checker reads: not the other branch of ``if TYPE_CHECKING``."""
    yield top
    for name, value in ast.iter_fields(top):
        if name == "orelse" and isinstance(top, ast.If) and ast.unparse(top.test) == "TYPE_CHECKING":
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _checked(child)


def _defines(node: ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _is_module(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("trt", *_MODULES)


def _imports_bindings(path: Path) -> bool:
    return any(
        isinstance(node, ast.Import) and any(name.name.split(".")[0] in _MODULES for name in node.names)
        for node in ast.walk(ast.parse(path.read_bytes()))
    )
