"""Writing plans into a Triton model repository."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtdeploy.errors import RepositoryError, UsageError
from trtdeploy.files import atomic_write, locked, sync_folder
from trtdeploy.plan import Manifest, manifest_path, read_plan
from trtdeploy.triton.config import LABELS_FILE, PackageOptions, config_text, make_config, schema
from trtdeploy.triton.config.warmup import WARMUP_FOLDER, write_warmup
from trtdeploy.triton.facts import label_difference, preprocessing_difference
from trtdeploy.triton.history import HISTORY_FILE

CONFIG_FILE = "config.pbtxt"
# The names that model.py and Triton's TensorRT backend look for.
_PYTHON_PLAN = "engine.plan"
_TENSORRT_PLAN = "model.plan"
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LARGEST_VERSION = 2**63 - 1
_NOT_THE_PARENT = (errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)


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


@dataclass(frozen=True)
class PlanFile:
    """A plan in memory, and its manifest."""

    content: bytes
    manifest: Manifest


def package(
    plan: str | Path,
    repository: str | Path,
    name: str,
    *,
    version: int | None = None,
    options: PackageOptions | None = None,
    replacing: Collection[str] = (),
) -> PackagedModel:
    """Add a plan to a model repository: its config, labels and a new version folder, which appears as a whole.

    To a model that was published before, it is added as ``publish`` does: with a config of its own, not served before
    it is promoted.

    Args:
        plan: A plan with its manifest.
        repository: The model repository; made if it is not there.
        name: Model name in Triton.
        version: Version number; the next free one if None.
        options: How it shall be served; the defaults if None.
        replacing: Ensembles that are replaced afterwards, and so need not fit.

    Raises:
        PlanCorruptError: The plan does not match its manifest.
        RepositoryError: The name or version is impossible or taken, the model that is there has other inputs or
            outputs, it leads out of the repository, an ensemble that runs it would no longer fit, or the repository
            cannot be written. Nothing has changed.
        ModelError: The plan cannot be served with these options.
        UsageError: A version policy was given for a published model.
    """
    from trtdeploy.triton.pipeline.fit import check_fit
    from trtdeploy.triton.versions import add_version

    root, options = Path(repository), options or PackageOptions()
    check_name(name, version)
    content, manifest = read_plan(plan)
    config = make_config(manifest, name, options)
    folder = root / name
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(folder, error=RepositoryError):
            inside(root, folder)
            whole = PlanFile(content, manifest)
            if (folder / HISTORY_FILE).exists():
                refuse_policy(options, name)
                number = add_version(whole, folder, version, config, options, step="package", replacing=replacing)
            else:
                fit_deployed(folder, config)
                number = free_version(folder, version)
                _check_policy(config, [*versions(folder), number])
                check_fit(root, name, config, None, replacing=replacing)
                publish_folder(whole, folder, number, config, options)
    except OSError as error:
        raise RepositoryError(f"The model repository {root} cannot be written: {error}.") from error
    return PackagedModel(name, number, folder)


def free_version(folder: Path, version: int | None) -> int:
    """Return the number of a version that shall be added: the next one if ``version`` is None.

    Raises:
        RepositoryError: It is taken, or there is no higher one.
    """
    following = max(versions(folder), default=0) + 1
    number = version if version is not None else following
    check_name(folder.name, number)
    if (folder / str(number)).exists():
        raise RepositoryError(
            f"{folder} already has a version {number}.", hint=f"Leave --version out to add version {following}."
        )
    return number


def refuse_policy(options: PackageOptions, name: str) -> None:
    """Refuse a version policy for a model that is published.

    Raises:
        UsageError: There is one in the options.
    """
    if options.version_policy is not None:
        raise UsageError(
            f"version_policy was given for {name}, which is published: promote and rollback say what is served of it.",
            hint="Leave version_policy out.",
        )


def check_name(name: str, version: int | None) -> None:
    """Refuse a name or a version that Triton cannot have, or that would lead out of the repository.

    Raises:
        RepositoryError: It is one.
    """
    if not _MODEL_NAME.fullmatch(name) or ".." in name:
        raise RepositoryError(
            f"{_shortened(name)!r} cannot be a model's name: up to 128 letters, digits, '.', '_' and '-', the "
            "first one a letter or digit, and no '..'.",
            hint="Triton uses the name as a folder and in URLs.",
        )
    if version is not None and not 1 <= version <= _LARGEST_VERSION:
        raise RepositoryError(f"Version {version} is not possible; Triton counts from 1 to {_LARGEST_VERSION}.")


def versions(folder: Path) -> list[int]:
    """Return the versions of a model, ascending."""
    if not folder.is_dir():
        return []
    return sorted(
        int(entry.name) for entry in folder.iterdir() if entry.is_dir() and re.fullmatch(r"[1-9]\d*", entry.name)
    )


def _check_policy(config: Any, there: Collection[int]) -> None:
    """Refuse a version policy that names a version that is not there: Triton would load none."""
    missing = sorted(set(config.version_policy.specific.versions) - set(there))
    if missing:
        raise RepositoryError(
            f"The version policy of {config.name} names version {missing[0]}; there would be {sorted(there)}.",
            hint="Name versions that are there in version_policy, or leave it out.",
        )


def inside(root: Path, folder: Path) -> None:
    """Refuse a model, or a version of it, that is a link to somewhere else."""
    for path in (folder, *(folder / str(number) for number in versions(folder))):
        if not path.resolve().is_relative_to(root.resolve()):
            raise RepositoryError(
                f"{path} leads out of the repository, to {path.resolve()}.", hint="Copy the files in place of the link."
            )


def read_config(folder: Path) -> Any:
    """Return the ``ModelConfig`` of a model folder.

    Raises:
        RepositoryError: There is no config, or Triton's schema refuses it.
    """
    path = folder / CONFIG_FILE
    return parse_config(read_text(path), str(path))


def parse_config(text: str, what: str = CONFIG_FILE) -> Any:
    """Return the ``ModelConfig`` that a text says; ``what`` is what an error calls it.

    Raises:
        RepositoryError: Triton's schema refuses it.
    """
    from google.protobuf import text_format

    try:
        return text_format.Parse(text, schema().ModelConfig())
    except text_format.ParseError as error:
        raise RepositoryError(f"{what} is not a Triton model configuration: {error}.") from error


def read_text(path: Path) -> str:
    """Return what a config file says.

    Raises:
        RepositoryError: It cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RepositoryError(f"{path} cannot be read: {error}.") from error


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


def fit_deployed(folder: Path, config: Any) -> None:
    """Refuse a version that needs another config than the deployed ones, for all versions share one.

    What says which versions are served is the operator's: ``config`` takes it over unless it says so itself.
    """
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
    for what, difference in (
        ("labels", label_difference(config, deployed)),
        ("preprocessing", preprocessing_difference(config, deployed)),
    ):
        if difference:
            raise RepositoryError(
                f"The {what} of this plan differ from those of {folder}: {difference}.",
                hint="All versions of a model share one config, and clients go by it: package it under another name.",
            )
    if deployed.HasField("version_policy") and not config.HasField("version_policy"):
        config.version_policy.CopyFrom(deployed.version_policy)


def _describe(tensors: dict[str, tuple[int, list[int]]]) -> str:
    types = schema().DataType
    return ", ".join(f"{name} {types.Name(kind)}{dims}" for name, (kind, dims) in sorted(tensors.items()))


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
        atomic_write(folder / "model.py", Path(__file__).with_name("python_model.py").read_bytes())
    atomic_write(target, plan.content)
    atomic_write(manifest_path(target), plan.manifest.to_json())


def _write_model_files(folder: Path, config: Any, manifest: Manifest) -> None:
    if manifest.labels is not None:
        atomic_write(folder / LABELS_FILE, "".join(f"{label}\n" for label in manifest.labels))
    atomic_write(folder / CONFIG_FILE, config_text(config))


def _shortened(name: str) -> str:
    return name if len(name) <= 60 else name[:60] + "..."
