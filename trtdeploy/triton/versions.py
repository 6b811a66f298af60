"""Versions of a model in a repository: publish, promote, roll back, list, prune.

A version lies in ``NAME/V/``: the plan, its manifest, the ``config.pbtxt`` that was derived for it, and a known sample.
It appears by one rename, complete and on disk. Which version is served stands in ``NAME/config.pbtxt``, as a version
policy with one version; replacing that file is the whole of a promotion. A kill at any point leaves one version or the
other.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtdeploy.errors import PlanIncompatibleError, RepositoryError, RuntimeUnavailableError
from trtdeploy.files import atomic_write, locked, sha256_bytes, sync_folder
from trtdeploy.plan import read_plan
from trtdeploy.tensors import Array
from trtdeploy.triton.config import PackageOptions, check_config, config_text, make_config
from trtdeploy.triton.history import Step, VersionFacts, read_history, write_history
from trtdeploy.triton.other_gpus import plans_by_capability
from trtdeploy.triton.pipeline.fit import check_fit
from trtdeploy.triton.repository import (
    CONFIG_FILE,
    PackagedModel,
    PlanFile,
    check_name,
    fit_deployed,
    free_version,
    inside,
    parse_config,
    publish_folder,
    read_config,
    read_text,
    refuse_policy,
    versions,
)
from trtdeploy.triton.sample import SAMPLE_FILE, default_sample, record_sample

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
        _keep_configs(folder)
        _keep_active(folder)
    files = {**(beside or {}), CONFIG_FILE: config_text(config).encode()}
    publish_folder(plan, folder, number, config, options, beside=files, keep_config=active is not None)
    digest = sha256_bytes((folder / CONFIG_FILE).read_bytes())
    # a config that was edited by hand stays so: adding a version does not change that
    ours = active is None or digest in history.config_sha256 or not history.config_sha256 or len(history.events) == 1
    write_history(folder, history.model_copy(update={"config_sha256": (digest,)}) if ours else history)
    return number


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
    _keep_configs(folder)
    atomic_write(folder / CONFIG_FILE, text)
    return Promotion(folder.name, number, before)


def rollback(repository: str | Path, name: str, version: int | None = None, *, force: bool = False) -> Promotion:
    """Make the version active that was so before, or ``version``.

    Raises:
        RepositoryError: Nobody knows which one it was, or as for ``promote``.
    """
    with editing(repository, name) as folder:
        return activate(folder, version or previous_version(folder), step="rollback", force=force)


def chosen_version(folder: Path, version: int | None) -> int:
    """Return the version that is there by this number; the newest one if it is None.

    Raises:
        RepositoryError: There is none.
    """
    there = versions(folder)
    if not there:
        raise RepositoryError(
            f"{folder} has no version: no folder in it is called by a number.",
            hint=f"Add one: trtdeploy publish PLAN --name {folder.name} --repository {folder.parent}",
        )
    number = version if version is not None else there[-1]
    if number not in there:
        raise RepositoryError(f"{folder} has no version {number}; it has {there}.")
    return number


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


def model_folder(repository: str | Path, name: str) -> Path:
    """Return ``REPOSITORY/NAME``.

    Raises:
        RepositoryError: The name is impossible, there is no such model, or it leads out of the repository.
    """
    root = Path(repository)
    check_name(name, None)
    folder = root / name
    if not (folder / CONFIG_FILE).is_file():
        raise RepositoryError(
            f"There is no model {name!r} in {root}.", hint="Make one: trtdeploy publish PLAN --name N --repository DIR"
        )
    inside(root, folder)
    return folder


def active_version(folder: Path) -> int | None:
    """Return the version that answers requests without one: the newest that the config serves."""
    return max(served_versions(folder), default=None)


def served_versions(folder: Path) -> list[int]:
    """Return the versions that the config serves, ascending; Triton's default is the newest one."""
    there = versions(folder)
    if not there or not (folder / CONFIG_FILE).exists():
        return []
    policy = read_config(folder).version_policy
    chosen = policy.WhichOneof("policy_choice")
    if chosen == "specific":
        return [number for number in there if number in policy.specific.versions]
    return there if chosen == "all" else there[-max(policy.latest.num_versions, 1) :]


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


def check_plan(version: Path) -> None:
    """Refuse a version whose plan is not the one that its manifest describes."""
    for manifest in version.glob("*.plan.json"):
        read_plan(manifest.with_suffix(""))


def _keep_configs(folder: Path) -> None:
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


def _clear_graves(folder: Path) -> None:
    for grave in folder.glob(".pruned-*"):
        shutil.rmtree(grave)
