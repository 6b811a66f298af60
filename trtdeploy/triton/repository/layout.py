"""What lies where in a model repository: models, versions, configs, and which version is served."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from trtdeploy.errors import RepositoryError
from trtdeploy.triton.config import schema

CONFIG_FILE = "config.pbtxt"
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LARGEST_VERSION = 2**63 - 1


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


def versions(folder: Path) -> list[int]:
    """Return the versions of a model, ascending."""
    if not folder.is_dir():
        return []
    return sorted(
        int(entry.name) for entry in folder.iterdir() if entry.is_dir() and re.fullmatch(r"[1-9]\d*", entry.name)
    )


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


def active_version(folder: Path) -> int | None:
    """Return the version that answers requests without one: the newest that the config serves."""
    return max(served_versions(folder), default=None)


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


def _shortened(name: str) -> str:
    return name if len(name) <= 60 else name[:60] + "..."
