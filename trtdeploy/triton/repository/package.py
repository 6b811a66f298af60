"""Packaging plans into a Triton model repository."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtdeploy.errors import RepositoryError
from trtdeploy.files import locked
from trtdeploy.plan import read_plan
from trtdeploy.triton.config import PackageOptions, make_config
from trtdeploy.triton.repository.add_version import add_version, fit_deployed, refuse_policy
from trtdeploy.triton.repository.differences.ensembles import check_fit
from trtdeploy.triton.repository.history import HISTORY_FILE
from trtdeploy.triton.repository.layout import check_name, free_version, inside, versions
from trtdeploy.triton.repository.version_folder import PlanFile, publish_folder


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


def _check_policy(config: Any, there: Collection[int]) -> None:
    """Refuse a version policy that names a version that is not there: Triton would load none."""
    missing = sorted(set(config.version_policy.specific.versions) - set(there))
    if missing:
        raise RepositoryError(
            f"The version policy of {config.name} names version {missing[0]}; there would be {sorted(there)}.",
            hint="Name versions that are there in version_policy, or leave it out.",
        )
