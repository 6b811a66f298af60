"""Write typed stubs of TensorRT's bindings from the signatures in their docstrings: ``typed_stubs.py MODULE OUT.pyi``.

Run it in a process that can import MODULE. pybind11 puts the signature of every function into its docstring, in terms
of Python classes, or of C++ classes where a function was bound before its argument's class; both are read. What no
docstring tells becomes ``object``, so that a use of it is reported instead of going unchecked.
"""

from __future__ import annotations

import ast
import ctypes
import importlib
import keyword
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

_HEADER = "import builtins\nimport collections.abc\nimport typing\nfrom typing import Any\n\nimport typing_extensions\n"
# typing.SupportsInt is what pybind11 says of an int argument; the callbacks that the product overrides receive an int
_SAME_AS = {"SupportsInt": "builtins.int", "SupportsFloat": "builtins.float", "Buffer": "typing_extensions.Buffer"}
# declared by py::implicitly_convertible, which leaves no trace in docstrings
_ALSO_TAKEN = {"Dims": "collections.abc.Sequence[builtins.int]", "Weights": "Any"}
_OF_EVERY_OBJECT = {"__eq__", "__ne__", "__hash__", "__repr__", "__str__", "__new__", "__doc__", "__module__"}
_OF_EVERY_OBJECT |= {"__getstate__", "__setstate__", "__reduce__", "__weakref__", "__dict__", "__members__"}
_BUILTINS = {"int", "float", "bool", "str", "bytes", "list", "tuple", "dict", "set", "slice", "object"}


class StubWriter:
    """Describes one module.

    Args:
        module: The imported bindings.
    """

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._classes = {name: value for name, value in vars(module).items() if isinstance(value, type)}

    def text(self) -> str:
        """Return the stub."""
        lines = [_HEADER]
        for name, value in vars(self._module).items():
            if name in self._classes:
                lines += self._class(name, value, name)
            elif not isinstance(value, ModuleType) and not (name.startswith("__") and name != "__version__"):
                lines += self._callable(name, value) if callable(value) else [f"{name}: {self._type_of(value)}"]
        return "\n".join(lines) + "\n"

    def _class(self, name: str, cls: type, qualified: str) -> list[str]:
        bases = [base.__name__ for base in cls.__bases__ if self._classes.get(base.__name__) is base]
        body = [f"__members__: typing.ClassVar[builtins.dict[builtins.str, {qualified}]]"]
        body = body if hasattr(cls, "__members__") else []
        for member, value in vars(cls).items():
            if member in _OF_EVERY_OBJECT or member.startswith(("_pybind11", "__pybind11", f"_{name}__", "__entries")):
                continue
            if isinstance(value, type):
                body += self._class(member, value, f"{qualified}.{member}")
            elif isinstance(value, property):
                body += self._property(member, value)
            elif isinstance(value, staticmethod):
                body += [line for part in self._callable(member, value.__func__) for line in ("@staticmethod", part)]
            elif callable(value):
                body += self._callable(member, value, method=True)
            else:
                body.append(f"{member}: typing.ClassVar[{self._type_of(value)}]")
        body += _callbacks(cls)
        body += list(_protocols(cls))
        return [f"class {name}({', '.join(bases)}):", *(f"    {line}" for line in body or ["..."])]

    def _property(self, name: str, value: property) -> list[str]:
        found = re.search(r"->\s*(.+)", (value.fget.__doc__ or "") if value.fget else "")
        taken = re.search(r"arg1:\s*(.+)\)\s*->", (value.fset.__doc__ or "") if value.fset else "")
        text = found or taken
        annotation = self._result(text[1]) if text else "builtins.object"
        if value.fset is not None:
            return [f"{name}: {annotation}"]
        return ["@property", f"def {name}(self) -> {annotation}: ..."]

    def _callable(self, name: str, value: Any, *, method: bool = False) -> list[str]:
        """Return one definition, or one for each overload."""
        signatures = re.findall(
            rf"^(?:\d+\. )?{re.escape(value.__name__)}(\(.*\)) -> (.+)$", value.__doc__ or "", re.MULTILINE
        )
        result = "None" if name == "__init__" else "builtins.object"
        untyped = f"def {name}({'self, ' if method else ''}*args: Any, **kwargs: Any) -> {result}: ..."
        found = [self._signature(name, arguments, result, method) or untyped for arguments, result in signatures]
        found = list(dict.fromkeys(found))
        if len(found) > 1:
            return [line for definition in found for line in ("@typing.overload", definition)]
        return found or [untyped]

    def _signature(self, name: str, arguments: str, result: str, method: bool) -> str | None:
        parts = [part.strip() for part in _split(arguments[1:-1])]
        if any(part.startswith("*") for part in parts):
            return None
        shown: list[str] = []
        default_seen = False
        for index, part in enumerate(parts):
            if index == 0 and method:
                shown.append("self")
                continue
            if part == "/":  # pybind11 writes it for positional arguments that have no name
                shown.append(part)
                continue
            argument, _, rest = part.partition(":")
            if keyword.iskeyword(argument):
                return None
            annotation, equals, _ = rest.partition("=")
            default_seen |= bool(equals)
            text = self._annotation(annotation)
            also = _ALSO_TAKEN.get(text)
            # pybind11 lets an argument without a default follow one that has one
            shown.append(f"{argument}: {text}{' | ' + also if also else ''}{' = ...' if default_seen else ''}")
        return f"def {name}({', '.join(shown)}) -> {self._result(result)}: ..."

    def _result(self, text: str) -> str:
        annotation = self._annotation(text)
        return "builtins.object" if annotation == "Any" else annotation

    def _annotation(self, text: str) -> str:
        """Translate pybind11's or C++'s name of a type; ``Any`` for what is no class of this module."""
        cleaned = re.sub(r"(?:\w+::)+(\w+)", r"\1", text.strip())
        try:
            tree = ast.parse(cleaned, mode="eval")
        except SyntaxError:
            return "Any"
        return ast.unparse(_Names(self._classes).visit(tree))

    def _type_of(self, value: object) -> str:
        if type(value).__module__ == "builtins":
            return "builtins.object" if value is None else f"builtins.{type(value).__name__}"
        return self._result(f"{type(value).__module__}.{type(value).__qualname__}")


class _Names(ast.NodeTransformer):
    def __init__(self, classes: dict[str, type]) -> None:
        self._classes = classes

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        full = ast.unparse(node)
        nested = re.search(r"\.tensorrt(?:_rtx)?\.(.+)$", full) or re.search(r"bindings\.(.+)$", full)
        if nested:
            return ast.parse(nested[1], mode="eval").body
        return self._named(node.attr, full)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._named(node.id, node.id)

    def _named(self, name: str, full: str) -> ast.expr:
        known = _SAME_AS.get(name)
        if known is None and full.startswith("collections.abc."):
            known = full
        for candidate in (name, name.removeprefix("I")):
            if known is None and candidate in self._classes:
                known = candidate
        if known is None and name in _BUILTINS:
            known = f"builtins.{name}"
        if name == "None":
            known = name
        return ast.parse(known or "Any", mode="eval").body


def _split(text: str) -> Iterator[str]:
    """Split arguments at the commas outside of brackets and quotes."""
    depth, start, quoted = 0, 0, False
    for index, letter in enumerate(text):
        if letter == "'":
            quoted = not quoted
        elif not quoted:
            depth += (letter in "([{<") - (letter in ")]}>")
            if letter == "," and depth == 0:
                yield text[start:index]
                start = index + 1
    if text[start:].strip():
        yield text[start:]


def _callbacks(cls: type) -> list[str]:
    """Return the methods that C++ looks up in subclasses: the base does not have them, its docstring shows them."""
    shown = re.findall(r"def (\w+)\(self(?:, )?([^)]*)\):", cls.__doc__ or "")
    return [
        f"def {name}(self{''.join(f', {argument}: Any' for argument in arguments.split(', ') if argument)}) -> Any: ..."
        for name, arguments in shown
        if not hasattr(cls, name)
    ]


def _protocols(cls: type) -> Iterator[str]:
    """Yield what Python lets every object of this kind do, though no method says so."""
    members = vars(cls)
    if "__getitem__" in members and "__len__" in members and "__iter__" not in members:
        yield "def __iter__(self) -> collections.abc.Iterator[builtins.int]: ..."
    if has_buffer(cls):
        yield "def __buffer__(self, flags: builtins.int, /) -> builtins.memoryview: ..."


def has_buffer(cls: type) -> bool:
    """Say whether ``memoryview`` and ``bytes`` take objects of a class: its type has a bf_getbuffer.

    The place of tp_as_buffer in a PyTypeObject is part of CPython's ABI: it follows 20 words.
    """
    as_buffer = ctypes.c_void_p.from_address(id(cls) + 20 * ctypes.sizeof(ctypes.c_void_p)).value
    return bool(as_buffer) and bool(ctypes.c_void_p.from_address(as_buffer).value)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(StubWriter(importlib.import_module(sys.argv[1])).text())
