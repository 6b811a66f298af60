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
from typing import Any

from trtdeploy.errors import ModelError, PlanIncompatibleError, RepositoryError, RuntimeUnavailableError
from trtdeploy.files import atomic_write, locked, sha256_bytes, sync_folder
from trtdeploy.plan import Manifest, read_plan
from trtdeploy.tensors import Array
from trtdeploy.triton.config import PackageOptions, check_config, config_text, make_config
from trtdeploy.triton.history import History, Step, VersionFacts, read_history, write_history
from trtdeploy.triton.pipeline.fit import check_fit
from trtdeploy.triton.repository import (
    CONFIG_FILE,
    PackagedModel,
    PlanFile,
    check_name,
    fit_deployed,
    parse_config,
    publish_folder,
    read_config,
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
            that runs it would no longer fit, somebody edited it meanwhile, or the repository cannot be written. Nothing
            has changed.
    """
    root, options = Path(repository), options or PackageOptions()
    check_name(name, version)
    content, manifest = read_plan(plan)
    config = make_config(manifest, name, options)
    extra: dict[str, bytes] = _plans_by_capability(config, manifest, other_gpus)
    try:
        extra[SAMPLE_FILE] = record_sample(Path(plan), sample or default_sample(manifest))
    except (PlanIncompatibleError, RuntimeUnavailableError) as error:
        logger.warning("No sample is kept for promotion to test the server with: %s", error.message)
    folder = root / name
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(folder, error=RepositoryError):
            inside(root, folder)
            fit_deployed(folder, config)
            number = version if version is not None else max(versions(folder), default=0) + 1
            active = active_version(folder)
            check_fit(root, name, config, number if active is None else None)
            _pin(config, number)
            extra[CONFIG_FILE] = config_text(config).encode()
            if active is not None:
                _keep_active(folder)
            publish_folder(
                PlanFile(content, manifest),
                folder,
                number,
                config,
                options,
                beside=extra,
                keep_config=active is not None,
            )
            history = read_history(folder).with_version(number, manifest).with_event("publish", number, active)
            write_history(folder, _with_digest(history, folder))
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
    there = versions(folder)
    number = version if version is not None else max(there)
    if number not in there:
        raise RepositoryError(f"{folder} has no version {number}; it has {there}.")
    before = active_version(folder)
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
    """Remove old versions: all but the newest ``keep``, the active one, and the one to roll back to.

    A version is renamed away before its files are deleted, so that none is ever seen half.

    Returns:
        The versions that are gone.
    """
    with editing(repository, name) as folder:
        there, active = versions(folder), active_version(folder)
        before = read_history(folder).before(active) if active is not None else None
        kept = {active, before, *(there[-keep:] if keep > 0 else ())}
        gone = [number for number in there if number not in kept]
        for number in gone:
            grave = folder / f".pruned-{number}"
            (folder / str(number)).rename(grave)
            sync_folder(folder)
        for grave in folder.glob(".pruned-*"):
            shutil.rmtree(grave)
        if gone:
            history = read_history(folder)
            left = {key: facts for key, facts in history.versions.items() if int(key) not in gone}
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


def inside(root: Path, folder: Path) -> None:
    """Refuse a model, or a version of it, that is a link to somewhere else."""
    for path in (folder, *(folder / str(number) for number in versions(folder))):
        if not path.resolve().is_relative_to(root.resolve()):
            raise RepositoryError(
                f"{path} leads out of the repository, to {path.resolve()}.", hint="Copy the files in place of the link."
            )


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
    """Return the config that serves one version alone."""
    own = folder / str(version) / CONFIG_FILE
    if own.is_file():
        return own.read_text()
    config = read_config(folder)  # packaged: it has none of its own
    _pin(config, version)
    return config_text(config)


def check_plan(version: Path) -> None:
    """Refuse a version whose plan is not the one that its manifest describes."""
    for manifest in version.glob("*.plan.json"):
        read_plan(manifest.with_suffix(""))


def _plans_by_capability(config: Any, manifest: Manifest, others: Sequence[str | Path]) -> dict[str, bytes]:
    """Enter plans for other GPUs into the config, and return their files.

    Triton takes the file that ``cc_model_filenames`` has for a GPU's compute capability, else the default one.
    """
    files: dict[str, bytes] = {}
    taken = {manifest.device.capability}
    for path in others:
        content, other = read_plan(path)
        if other.runtime.name != "tensorrt" or manifest.runtime != other.runtime:
            raise ModelError(
                f"{path} is a plan of {other.runtime.name} {other.runtime.version}; plans for several "
                f"GPUs are TensorRT's, of one version: {manifest.runtime.name} {manifest.runtime.version}."
            )
        if (other.inputs, other.outputs, other.onnx.sha256) != (
            manifest.inputs,
            manifest.outputs,
            manifest.onnx.sha256,
        ):
            raise ModelError(f"{path} was built from another model.", hint="Build all plans from one ONNX file.")
        if other.device.capability in taken:
            raise ModelError(f"There are two plans for compute capability {other.device.capability}.")
        taken.add(other.device.capability)
        name = f"sm{other.device.capability}.plan"
        config.cc_model_filenames[other.device.capability] = name
        files |= {name: content, f"{name}.json": other.to_json().encode()}
    return files


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


def _with_digest(history: History, folder: Path) -> History:
    digest = sha256_bytes((folder / CONFIG_FILE).read_bytes())
    if history.config_sha256 and digest not in history.config_sha256 and len(history.events) > 1:
        return history  # edited by hand: publishing does not change that
    return history.model_copy(update={"config_sha256": (digest,)})
