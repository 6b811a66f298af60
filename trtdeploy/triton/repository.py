"""Writing plans into a Triton model repository."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtdeploy.errors import RepositoryError
from trtdeploy.files import atomic_write, locked, sync_folder
from trtdeploy.plan import Manifest, manifest_path, read_plan
from trtdeploy.triton.config import LABELS_FILE, PackageOptions, make_config, render_config, schema

CONFIG_FILE = "config.pbtxt"
# The names that model.py and Triton's TensorRT backend look for.
_PYTHON_PLAN = "engine.plan"
_TENSORRT_PLAN = "model.plan"
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class PackagedModel:
    """Where a plan went.

    Attributes:
        name: Model name in Triton.
        version: Its version.
        folder: ``REPOSITORY/NAME``.
    """

    name: str
    version: int
    folder: Path


def package(
    plan: str | Path,
    repository: str | Path,
    name: str,
    *,
    version: int | None = None,
    options: PackageOptions | None = None,
) -> PackagedModel:
    """Add a plan to a model repository: its config, labels and a new version folder, which appears as a whole.

    Args:
        plan: A plan with its manifest.
        repository: The model repository; made if it is not there.
        name: Model name in Triton.
        version: Version number; the next free one if None.
        options: How it shall be served; the defaults if None.

    Raises:
        PlanCorruptError: The plan does not match its manifest.
        RepositoryError: The name or version is impossible or taken, the model that is there has other inputs or
            outputs, or the repository cannot be written. Nothing has changed.
        ModelError: The plan cannot be served with these options.
    """
    root = Path(repository)
    if not _MODEL_NAME.fullmatch(name) or ".." in name:
        raise RepositoryError(
            f"{name!r} cannot be a model's name: letters, digits, '.', '_' and '-' only, and no '..'.",
            hint="Triton uses the name as a folder and in URLs.",
        )
    if version is not None and version < 1:
        raise RepositoryError(f"Version {version} is not possible; Triton counts from 1.")
    _, manifest = read_plan(plan)
    options = options or PackageOptions()
    config = render_config(manifest, name, options)
    folder = root / name
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(folder, error=RepositoryError):
            _check_same_interface(folder, make_config(manifest, name, options))
            number = version if version is not None else max(versions(folder), default=0) + 1
            if (folder / str(number)).exists():
                raise RepositoryError(
                    f"{folder} already has a version {number}.",
                    hint=f"Leave --version out to add version {max(versions(folder)) + 1}.",
                )
            with _staging_folder(root) as staging:
                _write_version(staging / str(number), Path(plan), manifest)
                if folder.exists():
                    _write_model_files(folder, config, manifest)
                    (staging / str(number)).rename(folder / str(number))
                    sync_folder(folder)
                else:
                    _write_model_files(staging, config, manifest)
                    staging.rename(folder)
                    sync_folder(root)
    except OSError as error:
        raise RepositoryError(f"The model repository {root} cannot be written: {error}.") from error
    return PackagedModel(name, number, folder)


def versions(folder: Path) -> list[int]:
    """Return the versions of a model, ascending."""
    if not folder.is_dir():
        return []
    return sorted(
        int(entry.name) for entry in folder.iterdir() if entry.is_dir() and re.fullmatch(r"[1-9]\d*", entry.name)
    )


def read_config(folder: Path) -> Any:
    """Return the ``ModelConfig`` of a model folder.

    Raises:
        RepositoryError: There is no config, or Triton's schema refuses it.
    """
    from google.protobuf import text_format

    path = folder / CONFIG_FILE
    try:
        return text_format.Parse(path.read_text(), schema().ModelConfig())
    except (OSError, UnicodeDecodeError) as error:
        raise RepositoryError(f"{path} cannot be read: {error}.") from error
    except text_format.ParseError as error:
        raise RepositoryError(f"{path} is not a Triton model configuration: {error}.") from error


def model_names(repository: Path) -> list[str]:
    """Return the names of the models in a repository.

    Raises:
        RepositoryError: There is no such folder, or it holds no model.
    """
    if not repository.is_dir():
        raise RepositoryError(
            f"There is no model repository at {repository}.",
            hint="Make one: trtdeploy package PLAN --name N --repository DIR",
        )
    names = sorted(entry.name for entry in repository.iterdir() if (entry / CONFIG_FILE).is_file())
    if not names:
        raise RepositoryError(
            f"{repository} holds no model: no folder in it has a {CONFIG_FILE}.",
            hint="Add one: trtdeploy package PLAN --name N --repository DIR",
        )
    return names


def _check_same_interface(folder: Path, config: Any) -> None:
    """Refuse a version whose inputs or outputs differ from the deployed ones: all versions share one config."""
    if not (folder / CONFIG_FILE).exists():
        if folder.exists() and any(folder.iterdir()):
            raise RepositoryError(f"{folder} exists and is not a model of Triton's: it has no {CONFIG_FILE}.")
        return
    deployed = read_config(folder)
    if deployed.backend != config.backend:
        raise RepositoryError(
            f"{folder} is served by Triton's backend {deployed.backend!r}; this plan needs {config.backend!r}.",
            hint="Package it under another name.",
        )
    for kind in ("input", "output"):
        ours = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in getattr(config, kind)}
        theirs = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in getattr(deployed, kind)}
        if ours != theirs:
            raise RepositoryError(
                f"The {kind}s of this plan ({_describe(ours)}) are not those of {folder} ({_describe(theirs)}).",
                hint="All versions of a model share one config: package it under another name.",
            )


def _describe(tensors: dict[str, tuple[int, list[int]]]) -> str:
    types = schema().DataType
    return ", ".join(f"{name} {types.Name(kind)}{dims}" for name, (kind, dims) in sorted(tensors.items()))


@contextmanager
def _staging_folder(root: Path) -> Iterator[Path]:
    """Make a folder beside the repository, on the same file system, that vanishes unless it is renamed away.

    It cannot lie inside: a server that starts meanwhile takes every folder there for a model.
    """
    staging = Path(tempfile.mkdtemp(prefix=f".{root.name}.staging-", dir=root.resolve().parent))
    staging.chmod(0o755)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_version(folder: Path, plan: Path, manifest: Manifest) -> None:
    folder.mkdir()
    if manifest.runtime.name == "tensorrt":
        target = folder / _TENSORRT_PLAN
    else:
        target = folder / _PYTHON_PLAN
        atomic_write(folder / "model.py", Path(__file__).with_name("python_model.py").read_bytes())
    atomic_write(target, plan.read_bytes())
    atomic_write(manifest_path(target), manifest.to_json())


def _write_model_files(folder: Path, config: str, manifest: Manifest) -> None:
    if manifest.labels is not None:
        atomic_write(folder / LABELS_FILE, "".join(f"{label}\n" for label in manifest.labels))
    atomic_write(folder / CONFIG_FILE, config)
