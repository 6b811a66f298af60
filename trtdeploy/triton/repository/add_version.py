"""Adding a version to a model that is there, and the config that each version is served with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trtdeploy.errors import RepositoryError, UsageError
from trtdeploy.files import atomic_write, sha256_bytes
from trtdeploy.triton.config import PackageOptions, config_text, schema
from trtdeploy.triton.repository.differences.ensembles import check_fit
from trtdeploy.triton.repository.differences.facts import label_difference, preprocessing_difference
from trtdeploy.triton.repository.history import Step, read_history, write_history
from trtdeploy.triton.repository.layout import (
    CONFIG_FILE,
    active_version,
    free_version,
    parse_config,
    read_config,
    read_text,
    served_versions,
    versions,
)
from trtdeploy.triton.repository.version_folder import PlanFile, publish_folder


def add_version(
    plan: PlanFile,
    folder: Path,
    version: int | None,
    config: Any,
    options: PackageOptions,
    *,
    step: Step,
    beside: Mapping[str, bytes] | None = None,
    replacing: Collection[str] = (),
) -> int:
    """Add a version that is not served before it is promoted, unless it is the first one; the caller holds the lock.

    Args:
        plan: The plan.
        folder: The model's folder.
        version: Version number; the next free one if None.
        config: What it shall be served with.
        options: Where that comes from.
        step: What the history calls it.
        beside: Further files of the version, by name.
        replacing: Ensembles that are replaced afterwards, and so need not fit.

    Returns:
        The version.

    Raises:
        RepositoryError: See ``publish``.
    """
    fit_deployed(folder, config)
    number, active = free_version(folder, version), active_version(folder)
    check_fit(folder.parent, folder.name, config, number if active is None else None, replacing=replacing)
    _pin(config, number)
    history = read_history(folder).with_version(number, plan.manifest).with_event(step, number, active)
    if active is not None:
        keep_configs(folder)
        _keep_active(folder)
    files = {**(beside or {}), CONFIG_FILE: config_text(config).encode()}
    publish_folder(plan, folder, number, config, options, beside=files, keep_config=active is not None)
    digest = sha256_bytes((folder / CONFIG_FILE).read_bytes())
    # a config that was edited by hand stays so: adding a version does not change that
    ours = active is None or digest in history.config_sha256 or not history.config_sha256 or len(history.events) == 1
    write_history(folder, history.model_copy(update={"config_sha256": (digest,)}) if ours else history)
    return number


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


def config_of(folder: Path, version: int) -> str:
    """Return the config that serves one version alone.

    Raises:
        RepositoryError: It cannot be read, or Triton's schema refuses it.
    """
    own = folder / str(version) / CONFIG_FILE
    if own.is_file():
        text = read_text(own)
        parse_config(text, str(own))
        return text
    config = read_config(folder)  # packaged: it has none of its own
    _pin(config, version)
    return config_text(config)


def keep_configs(folder: Path) -> None:
    """Give each version that has no config of its own the present one, before another one takes its place.

    Such versions were packaged or copied, and are served with the model's config: so they are after a rollback, too.
    """
    for number in versions(folder):
        own = folder / str(number) / CONFIG_FILE
        if not own.exists():
            atomic_write(own, config_of(folder, number))


def _keep_active(folder: Path) -> None:
    """Name the versions that are served in the config, so that a new folder beside them changes nothing."""
    config = read_config(folder)
    if config.version_policy.WhichOneof("policy_choice") == "specific":
        return
    _pin(config, *served_versions(folder))
    atomic_write(folder / CONFIG_FILE, config_text(config))


def _pin(config: Any, *served: int) -> None:
    config.version_policy.Clear()
    config.version_policy.specific.versions.extend(served)


def _describe(tensors: dict[str, tuple[int, list[int]]]) -> str:
    types = schema().DataType
    return ", ".join(f"{name} {types.Name(kind)}{dims}" for name, (kind, dims) in sorted(tensors.items()))
