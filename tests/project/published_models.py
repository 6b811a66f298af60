"""Models that KServe and others publish of the custom resources, as strict checkers of a manifest.

Two wheels from the package index, of which only the descriptions of resources are read; nothing of them is installed:

- ``kserve``, KServe's own SDK, generated from the same Go types as its custom resource definitions: names and types of
  the fields of an InferenceService. What is Kubernetes' own in it is checked as a Pod elsewhere.
- ``cloudcoil-models-prometheus-operator``, pydantic models generated from the operator's custom resource definitions.

``python published_models.py FOLDER`` fetches them, about 1 MB.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(sys.prefix) / "resource_models"
WHEELS = {"kserve": "0.21.0", "cloudcoil-models-prometheus-operator": "0.80.1.0"}
_PLAIN: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "float": (int, float)}


class Missing(Exception):
    """The wheel is not there."""


def wheel(name: str) -> Path:
    """Return a wheel that was fetched."""
    found = sorted(FOLDER.glob(f"{name.replace('-', '_')}-{WHEELS[name]}-*.whl"))
    if not found:
        raise Missing(f"{name} {WHEELS[name]} is not in {FOLDER}: python {__file__} {FOLDER}")
    return found[0]


def fetch(folder: Path) -> None:
    """Download what is missing; a wheel appears as a whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, version in WHEELS.items():
        if list(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")):
            continue
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as staging:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            # nothing of them runs as it is, so that the Python that they want does not matter
            command += ["--no-deps", "--ignore-requires-python", "--only-binary", ":all:"]
            command += ["--dest", staging, f"{name}=={version}"]
            subprocess.run(command, check=True)
            for path in Path(staging).glob("*.whl"):
                os.replace(path, folder / path.name)


def kserve_errors(resource: Any, kind: str = "V1beta1InferenceService") -> list[str]:
    """Say which fields of a resource KServe's SDK does not know, or knows as something else."""
    models: dict[str, dict[str, tuple[str, str]]] = {}
    with zipfile.ZipFile(wheel("kserve")) as content:
        for path in content.namelist():
            if re.fullmatch(r"kserve/models/v1\w+\.py", path):
                models |= _fields(ast.parse(content.read(path)))
    return list(_walk(resource, kind, kind, models))


def _fields(module: ast.Module) -> dict[str, dict[str, tuple[str, str]]]:
    """Return, for each model of a file, its fields' names in JSON with the name and the type that the SDK has."""
    found = {}
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            tables = {
                target.id: ast.literal_eval(statement.value)
                for statement in node.body
                if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict)
                for target in statement.targets
                if isinstance(target, ast.Name)
            }
            names = tables["attribute_map"]
            found[node.name] = {names[name]: (name, kind) for name, kind in tables["openapi_types"].items()}
    return found


def _walk(value: Any, kind: str, where: str, models: dict[str, dict[str, tuple[str, str]]]) -> Iterator[str]:
    if inner := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            yield f"{where} is no list"
            return
        for index, entry in enumerate(value):
            yield from _walk(entry, inner[1], f"{where}[{index}]", models)
    elif kind in models:
        if not isinstance(value, dict):
            yield f"{where} is no {kind}"
            return
        for name, entry in value.items():
            if name not in models[kind]:
                yield f"{where}.{name} is unknown"
            else:
                yield from _walk(entry, models[kind][name][1], f"{where}.{name}", models)
    elif kind in _PLAIN and (not isinstance(value, _PLAIN[kind]) or (isinstance(value, bool) and kind != "bool")):
        yield f"{where} is {value!r}, no {kind}"


@functools.cache
def service_monitor() -> Any:
    """Return the pydantic model of a ServiceMonitor, which refuses unknown fields.

    The models of the wheel take what they do not know; here they are derived from a base class that does not.
    """
    import pydantic

    class Strict(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid", populate_by_name=False)

    class Open(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="allow")

    class Unused:
        """What only builds objects step by step."""

        def __class_getitem__(cls, parameters: Any) -> Any:
            return cls

    names = ("BaseBuilder", "BaseModelBuilder", "BuilderContextBase", "GenericListBuilder", "ListBuilderContext")
    standing_in = {
        "cloudcoil": {"apimachinery": _module("apimachinery", ObjectMeta=Open, ListMeta=Open)},
        "cloudcoil.pydantic": {**dict.fromkeys(names, Unused), "Never": Any, "Self": Any, "BaseModel": Strict},
        "cloudcoil.resources": {"Resource": Strict, "ResourceList": Unused},
    }
    with zipfile.ZipFile(wheel("cloudcoil-models-prometheus-operator")) as content:
        code = content.read("cloudcoil/models/prometheus_operator/v1.py")
    made = _module("resource_models_of_prometheus_operator")
    before = {name: sys.modules.get(name) for name in (*standing_in, made.__name__)}
    sys.modules |= {name: _module(name, **content) for name, content in standing_in.items()} | {made.__name__: made}
    try:
        exec(compile(code, "v1.py", "exec"), made.__dict__)
        made.ServiceMonitor.model_rebuild()
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return made.ServiceMonitor


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(content)
    return module


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python published_models.py FOLDER")
    try:
        fetch(Path(sys.argv[1]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"published_models: pip ended with {error.returncode}; its message is above")
