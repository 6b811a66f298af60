"""Serving a deployed model with other options: the plan stays, its config is derived anew."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtdeploy.errors import ModelError, RepositoryError
from trtdeploy.files import atomic_write, sha256_bytes
from trtdeploy.plan import Manifest, read_plan
from trtdeploy.triton.config import PackageOptions, check_config, config_text, make_config
from trtdeploy.triton.config.options_from_config import options_of
from trtdeploy.triton.config.warmup import write_warmup
from trtdeploy.triton.repository.history import HISTORY_FILE, read_history, write_history
from trtdeploy.triton.repository.layout import CONFIG_FILE, active_version, inside, model_folder, read_config
from trtdeploy.triton.repository.versions import editing

_PLANS = ("engine.plan", "model.plan")


@dataclass(frozen=True)
class Deployed:
    """A model of a repository, as one look found it.

    Attributes:
        folder: ``REPOSITORY/NAME``.
        version: The version that is served.
        manifest: Of its plan.
        options: What its config is derived from. Samples for warm-up lie in a temporary folder.
        files: Names of the files for single GPUs by compute capability.
        config_sha256: Digest of ``config.pbtxt``.
        ensembles: Largest batch of each ensemble in the repository that runs this model, by name.
    """

    folder: Path
    version: int
    manifest: Manifest
    options: PackageOptions
    files: dict[str, str]
    config_sha256: str
    ensembles: dict[str, int]

    def derive(self, options: PackageOptions) -> Any:
        """Return the checked ``ModelConfig`` that serves the model with other options.

        Raises:
            ModelError: The plan cannot be served so, Triton would refuse it, or an ensemble needs larger batches.
        """
        config = make_config(self.manifest, self.folder.name, options)
        config.cc_model_filenames.update(self.files)
        errors = [finding for finding in check_config(config) if finding.severity == "error"]
        if errors:
            raise ModelError("; ".join(map(str, errors)))
        needs = {name: size for name, size in self.ensembles.items() if size > config.max_batch_size}
        if needs:
            name, size = max(needs.items(), key=lambda need: need[1])
            raise ModelError(
                f"The ensemble {name} sends batches of up to {size}; max_batch_size would be {config.max_batch_size}."
            )
        return config

    @contextmanager
    def copied(self, options: PackageOptions) -> Iterator[Path]:
        """Make a repository that holds this model alone, served with other options; it is gone at the end.

        Raises:
            ModelError: See ``derive``; or the checker refuses the config with the model's files.
        """
        config = self.derive(options)
        with tempfile.TemporaryDirectory(prefix="trtdeploy-retune-") as temporary:
            folder = Path(temporary) / "models" / self.folder.name
            shutil.copytree(self.folder / str(self.version), folder / str(self.version))
            for file in self.folder.iterdir():
                if file.is_file() and file.name not in (CONFIG_FILE, HISTORY_FILE):
                    shutil.copy2(file, folder / file.name)
            write_warmup(folder, self.manifest, options, batched=config.max_batch_size > 0)
            config.ClearField("version_policy")  # the copy has one version
            atomic_write(folder / CONFIG_FILE, config_text(config))
            errors = [finding for finding in check_config(config, folder) if finding.severity == "error"]
            if errors:
                raise ModelError("; ".join(map(str, errors)))
            yield folder.parent


@contextmanager
def deployed_model(repository: str | Path, name: str) -> Iterator[Deployed]:
    """Look at a model that trtdeploy has packaged or published.

    Raises:
        RepositoryError: There is no such model, it has no plan of ours, or its config was edited by hand.
        PlanCorruptError: The plan does not match its manifest.
    """
    folder = model_folder(repository, name)
    with tempfile.TemporaryDirectory(prefix="trtdeploy-samples-") as samples:
        yield _look(folder, Path(samples))


def _look(folder: Path, samples: Path) -> Deployed:
    version, digest = active_version(folder), _digest(folder)
    config = read_config(folder)
    if config.platform == "ensemble":
        steps = ", ".join(step.model_name for step in config.ensemble_scheduling.step)
        raise RepositoryError(f"{folder.name} is an ensemble: it has no instances and no batching of its own.",
                              hint=f"Take one of the models that it runs: {steps}.")  # fmt: skip
    manifest = _manifest(folder, version) if version is not None else None
    if version is None or manifest is None:
        raise RepositoryError(
            f"{folder} holds no plan of trtdeploy's.", hint="Add one: trtdeploy package PLAN --name N --repository DIR"
        )
    return Deployed(
        folder=folder,
        version=version,
        manifest=manifest,
        options=options_of(config, manifest, folder, samples),
        files=dict(config.cc_model_filenames),
        config_sha256=digest,
        ensembles=_ensembles_over(folder),
    )


def retune(deployed: Deployed, options: PackageOptions) -> tuple[str, str]:
    """Serve a model with other options; a server takes them at its next load of the model.

    The version's own config follows, so that a rollback and a promotion later keep the options. A kill at any point
    leaves the old config served, or the new one.

    Args:
        deployed: The model as it was found when the options were chosen.
        options: What to serve it with; which versions are served stays as it is.

    Returns:
        The text of ``config.pbtxt`` before and after.

    Raises:
        ModelError: See ``Deployed.derive``.
        RepositoryError: The model has changed since it was looked at; nothing was written.
    """
    kept = options.model_copy(update={"version_policy": deployed.options.version_policy})
    config = deployed.derive(kept)
    with editing(deployed.folder.parent, deployed.folder.name) as folder:
        inside(folder.parent, folder)
        _refuse_changed(deployed, folder)
        before = (folder / CONFIG_FILE).read_text()
        text = config_text(config)
        if before == text:
            return before, text
        write_warmup(folder, deployed.manifest, kept, batched=config.max_batch_size > 0)
        errors = [finding for finding in check_config(text, folder) if finding.severity == "error"]
        if errors:
            raise ModelError("; ".join(map(str, errors)))
        if (folder / HISTORY_FILE).exists():
            history = read_history(folder).with_event("retune", deployed.version, deployed.version)
            # both digests: a kill before the next lines leaves the old config, and no false alarm
            digests = (sha256_bytes(before.encode()), sha256_bytes(text.encode()))
            write_history(folder, history.model_copy(update={"config_sha256": digests}))
        own = folder / str(deployed.version) / CONFIG_FILE
        if own.is_file():
            pinned = deployed.derive(kept)
            pinned.version_policy.Clear()
            pinned.version_policy.specific.versions.append(deployed.version)
            atomic_write(own, config_text(pinned))
        atomic_write(folder / CONFIG_FILE, text)
    return before, text


def _refuse_changed(deployed: Deployed, folder: Path) -> None:
    manifest = _manifest(folder, deployed.version)
    changed = [
        what
        for what, same in (
            ("its config", _digest(folder) == deployed.config_sha256),
            ("the served version", active_version(folder) == deployed.version),
            ("its plan", manifest is not None and manifest.plan_sha256 == deployed.manifest.plan_sha256),
            ("an ensemble over it", _ensembles_over(folder) == deployed.ensembles),
        )
        if not same
    ]
    if changed:
        raise RepositoryError(
            f"{folder} has changed meanwhile: {', '.join(changed)}. Nothing was written.",
            hint="What was measured is not what is there now: measure again.",
        )


def _manifest(folder: Path, version: int) -> Manifest | None:
    for name in _PLANS:
        if (folder / str(version) / name).is_file():
            return read_plan(folder / str(version) / name)[1]
    return None


def _digest(folder: Path) -> str:
    return sha256_bytes((folder / CONFIG_FILE).read_bytes())


def _ensembles_over(folder: Path) -> dict[str, int]:
    found = {}
    for path in sorted(folder.parent.iterdir()):
        if path != folder and (path / CONFIG_FILE).is_file():
            config = read_config(path)
            if any(step.model_name == folder.name for step in config.ensemble_scheduling.step):
                found[path.name] = int(config.max_batch_size)
    return found
