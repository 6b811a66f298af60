"""Versions of a model in a repository: publish, promote, roll back, list, prune.

A version lies in ``NAME/V/``: the plan, its manifest, the ``config.pbtxt`` that was derived for it, and a known sample.
It appears by one rename, complete and on disk. Which version is served stands in ``NAME/config.pbtxt``, as a version
policy with one version; replacing that file is the whole of a promotion. A kill at any point leaves one version or the
other.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from trtdeploy.errors import PlanIncompatibleError, RepositoryError, RuntimeUnavailableError
from trtdeploy.files import atomic_write, locked, sha256_bytes, sync_folder
from trtdeploy.plan import read_plan
from trtdeploy.tensors import Array
from trtdeploy.triton.config import PackageOptions, check_config, make_config
from trtdeploy.triton.repository.add_version import add_version, config_of, keep_configs, refuse_policy
from trtdeploy.triton.repository.differences.ensembles import check_fit
from trtdeploy.triton.repository.history import Step, VersionFacts, read_history, write_history
from trtdeploy.triton.repository.layout import (
    CONFIG_FILE,
    active_version,
    check_name,
    chosen_version,
    inside,
    model_folder,
    parse_config,
    served_versions,
    versions,
)
from trtdeploy.triton.repository.other_gpus import plans_by_capability
from trtdeploy.triton.repository.package import PackagedModel
from trtdeploy.triton.repository.sample import SAMPLE_FILE, default_sample, record_sample
from trtdeploy.triton.repository.version_folder import PlanFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Promotion:
    """What a promotion or a rollback has changed.

    Attributes:
        name: The model.
        version: The version that is active now.
        before: The one that was active before.
        answered_by: How often each version has answered the known sample; empty where no server was asked.
    """

    name: str
    version: int
    before: int | None
    answered_by: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ListedVersion:
    """One version of a model; facts are None where it was not published but packaged or copied."""

    version: int
    active: bool
    facts: VersionFacts | None


def publish(
    plan: str | Path,
    repository: str | Path,
    name: str,
    *,
    version: int | None = None,
    options: PackageOptions | None = None,
    sample: Mapping[str, Array] | None = None,
    other_gpus: Sequence[str | Path] = (),
) -> PackagedModel:
    """Add a version to a repository. It is not served before it is promoted, unless it is the first one.

    Args:
        plan: A plan with its manifest.
        repository: The model repository; made if it is not there.
        name: Model name in Triton.
        version: Version number; the next free one if None.
        options: How it shall be served.
        sample: A known input by name, to test a server with; noise if None.
        other_gpus: The same model's TensorRT plans for other compute capabilities; each GPU loads its own.

    Raises:
        PlanCorruptError: The plan does not match its manifest.
        ModelError: The plan cannot be served with these options.
        RepositoryError: The name or version is impossible or taken, the model that is there is another, an ensemble
            that runs it would no longer fit, or the repository cannot be written. Nothing has changed.
        UsageError: The options have a version policy.
    """
    root, options = Path(repository), options or PackageOptions()
    check_name(name, version)
    refuse_policy(options, name)
    content, manifest = read_plan(plan)
    config = make_config(manifest, name, options)
    extra: dict[str, bytes] = plans_by_capability(config, manifest, other_gpus)
    try:
        extra[SAMPLE_FILE] = record_sample(Path(plan), sample or default_sample(manifest))
    except (PlanIncompatibleError, RuntimeUnavailableError) as error:
        logger.warning("No sample is kept for promotion to test the server with: %s", error.message)
    folder = root / name
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(folder, error=RepositoryError):
            inside(root, folder)
            whole = PlanFile(content, manifest)
            number = add_version(whole, folder, version, config, options, step="publish", beside=extra)
    except OSError as error:
        raise RepositoryError(f"The model repository {root} cannot be written: {error}.") from error
    return PackagedModel(name, number, folder)


def promote(
    repository: str | Path, name: str, version: int | None = None, *, step: Step = "promote", force: bool = False
) -> Promotion:
    """Make a version the active one; a server takes it at its next load of the model.

    Args:
        repository: The model repository.
        name: The model.
        version: The version; the newest if None.
        step: What the history calls it.
        force: Go on although somebody has edited ``config.pbtxt`` by hand, and the edit is lost, or although an
            ensemble no longer fits.

    Raises:
        RepositoryError: There is no such model or version, its files are damaged, an ensemble that runs it would no
            longer fit, or its config was edited by hand.
    """
    with editing(repository, name) as folder:
        return activate(folder, version, step=step, force=force)


def activate(folder: Path, version: int | None, *, step: Step, force: bool = False) -> Promotion:
    """Make a version active; the caller holds the lock. See ``promote``."""
    number, before = chosen_version(folder, version), active_version(folder)
    text = config_of(folder, number)
    errors = [finding for finding in check_config(text, folder, gpus=None) if finding.severity == "error"]
    check_plan(folder / str(number))
    if errors and not force:
        raise RepositoryError(f"Version {number} of {folder.name} cannot be served: {errors[0]}")
    if not force:
        check_fit(folder.parent, folder.name, parse_config(text), number)
    history = read_history(folder)
    current = (folder / CONFIG_FILE).read_bytes()
    if history.config_sha256 and sha256_bytes(current) not in history.config_sha256 and not force:
        raise RepositoryError(
            f"{folder / CONFIG_FILE} was edited after trtdeploy had written it; promoting would undo the edit.",
            hint="Publish the plan again with the options that you want, or give --force.",
        )
    if before == number and current.decode() == text:
        return Promotion(folder.name, number, before)
    history = history.with_event(step, number, before)
    # both digests: a kill before the next line leaves the old config, and no false alarm
    digests = (sha256_bytes(current), sha256_bytes(text.encode()))
    write_history(folder, history.model_copy(update={"config_sha256": digests}))
    keep_configs(folder)
    atomic_write(folder / CONFIG_FILE, text)
    return Promotion(folder.name, number, before)


def rollback(repository: str | Path, name: str, version: int | None = None, *, force: bool = False) -> Promotion:
    """Make the version active that was so before, or ``version``.

    Raises:
        RepositoryError: Nobody knows which one it was, or as for ``promote``.
    """
    with editing(repository, name) as folder:
        return activate(folder, version or previous_version(folder), step="rollback", force=force)


def previous_version(folder: Path) -> int:
    """Return the version that was active before.

    Raises:
        RepositoryError: There is none that is still there.
    """
    active = active_version(folder)
    before = read_history(folder).before(active) if active is not None else None
    if before is None or before not in versions(folder):
        raise RepositoryError(
            f"{folder.name} has no version to roll back to; active is {active}, there are {versions(folder)}.",
            hint="Name one: --version V",
        )
    return before


def list_versions(repository: str | Path, name: str) -> list[ListedVersion]:
    """Return the versions of a model, ascending.

    Raises:
        RepositoryError: There is no such model, or its manifest is damaged.
    """
    folder = model_folder(repository, name)
    active, known = active_version(folder), read_history(folder).versions
    return [ListedVersion(number, number == active, known.get(str(number))) for number in versions(folder)]


def prune(repository: str | Path, name: str, *, keep: int) -> list[int]:
    """Remove old versions: all but the newest ``keep``, those that are served, and the one to roll back to.

    A version is renamed away before its files are deleted, so that none is ever seen half.

    Returns:
        The versions that are gone.
    """
    with editing(repository, name) as folder:
        there, active = versions(folder), active_version(folder)
        before = read_history(folder).before(active) if active is not None else None
        kept = {before, *served_versions(folder), *(there[-keep:] if keep > 0 else ())}
        gone = [number for number in there if number not in kept]
        _clear_graves(folder)  # of one who was killed: the number may have been given anew
        for number in gone:
            (folder / str(number)).rename(folder / f".pruned-{number}")
            sync_folder(folder)
        _clear_graves(folder)
        if gone:
            history = read_history(folder)
            left = {key: facts for key, facts in history.versions.items() if key not in set(map(str, gone))}
            history = history.model_copy(update={"versions": left})
            for number in gone:
                history = history.with_event("prune", number, active)
            write_history(folder, history)
        return gone


@contextmanager
def editing(repository: str | Path, name: str) -> Iterator[Path]:
    """Hold the lock of a model that exists, and yield its folder."""
    folder = model_folder(repository, name)
    try:
        with locked(folder, error=RepositoryError):
            yield folder
    except OSError as error:
        raise RepositoryError(f"{folder} cannot be changed: {error}.") from error


def check_plan(version: Path) -> None:
    """Refuse a version whose plan is not the one that its manifest describes."""
    for manifest in version.glob("*.plan.json"):
        read_plan(manifest.with_suffix(""))


def _clear_graves(folder: Path) -> None:
    for grave in folder.glob(".pruned-*"):
        shutil.rmtree(grave)
