"""A version's folder in a model repository, which appears as a whole."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtdeploy.files import atomic_write, sync_folder
from trtdeploy.plan import Manifest, manifest_path
from trtdeploy.triton import backend
from trtdeploy.triton.config import LABELS_FILE, PackageOptions, config_text
from trtdeploy.triton.config.warmup import WARMUP_FOLDER, write_warmup
from trtdeploy.triton.repository.layout import CONFIG_FILE

# The names that model.py and Triton's TensorRT backend look for.
_PYTHON_PLAN = "engine.plan"
_TENSORRT_PLAN = "model.plan"
_NOT_THE_PARENT = (errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class PlanFile:
    """A plan in memory, and its manifest."""

    content: bytes
    manifest: Manifest


def publish_folder(
    plan: PlanFile,
    folder: Path,
    number: int,
    config: Any,
    options: PackageOptions,
    *,
    beside: Mapping[str, bytes] | None = None,
    keep_config: bool = False,
) -> None:
    """Make a version appear as a whole, with the model's folder where that is new; the caller holds its lock.

    Args:
        plan: The plan.
        folder: The model's folder.
        number: The version.
        config: What the model shall be served with.
        options: Where that comes from.
        beside: Further files of the version, by name.
        keep_config: Leave the config of a model that is there as it is.
    """
    root = folder.parent
    try:
        _publish(root.resolve().parent, plan, folder, number, config, options, beside or {}, keep_config)
    except OSError as error:
        if error.errno not in _NOT_THE_PARENT:
            raise
        # The repository is a mount point, or its parent is not ours to write
        _publish(root, plan, folder, number, config, options, beside or {}, keep_config)


def _publish(
    parent: Path,
    plan: PlanFile,
    folder: Path,
    number: int,
    config: Any,
    options: PackageOptions,
    beside: Mapping[str, bytes],
    keep_config: bool,
) -> None:
    """Write a version in ``parent`` and rename it, with the model's folder where that is new, into the repository."""
    with _staging_folder(parent, folder) as staging:
        _write_version(staging / str(number), plan)
        for name, content in beside.items():
            atomic_write(staging / str(number) / name, content)
        write_warmup(staging, plan.manifest, options, batched=config.max_batch_size > 0)
        _write_model_files(staging, config, plan.manifest)
        if folder.exists():
            for file in sorted((staging / WARMUP_FOLDER).glob("*")):
                (folder / WARMUP_FOLDER).mkdir(exist_ok=True)
                file.replace(folder / WARMUP_FOLDER / file.name)
            for name in () if keep_config else (LABELS_FILE, CONFIG_FILE):
                if (staging / name).exists():
                    (staging / name).replace(folder / name)
            (staging / str(number)).rename(folder / str(number))
            sync_folder(folder)
        else:
            staging.rename(folder)
            sync_folder(folder.parent)


@contextmanager
def _staging_folder(parent: Path, folder: Path) -> Iterator[Path]:
    """Make a folder that vanishes unless it is renamed away; the caller holds the lock of ``folder``.

    It lies beside the repository where it can: a server that starts meanwhile takes every folder inside for a model.
    """
    staging = parent / f".{folder.parent.resolve().name}.staging-{folder.name}"
    if staging.exists():  # left by somebody who was killed
        shutil.rmtree(staging)
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_version(folder: Path, plan: PlanFile) -> None:
    folder.mkdir()
    if plan.manifest.runtime.name == "tensorrt":
        target = folder / _TENSORRT_PLAN
    else:
        target = folder / _PYTHON_PLAN
        atomic_write(folder / "model.py", (backend.FOLDER / "model.py").read_bytes())
    atomic_write(target, plan.content)
    atomic_write(manifest_path(target), plan.manifest.to_json())


def _write_model_files(folder: Path, config: Any, manifest: Manifest) -> None:
    if manifest.labels is not None:
        atomic_write(folder / LABELS_FILE, "".join(f"{label}\n" for label in manifest.labels))
    atomic_write(folder / CONFIG_FILE, config_text(config))
