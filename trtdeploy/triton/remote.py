"""A model repository behind a URL (S3, GCS, any file system of fsspec): work on a copy, then upload what has changed.

Object stores have no rename. No reader sees half a version nevertheless, by the order of the writes: a config only ever
names versions that are complete. Where the new config names versions that are there already, it goes first; the config
of a new model goes last, after all that it names. Versions are deleted after that. There is no lock either: whoever
finds that the config was changed since he took his copy gives up, and nothing of his is served.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trtdeploy.errors import RepositoryError, RuntimeUnavailableError
from trtdeploy.files import sha256_file
from trtdeploy.triton.history import HISTORY_FILE
from trtdeploy.triton.repository import CONFIG_FILE, check_name, read_config, versions


def is_url(repository: str | Path) -> bool:
    """Say whether a repository is a URL of fsspec and no local path."""
    return isinstance(repository, str) and "://" in repository


@contextmanager
def checked_out(repository: str | Path, name: str) -> Iterator[Path]:
    """Yield a local repository with this model; at the end of a block without an error, what has changed is uploaded.

    Of the other models only the configs are there, and stay as they are. A local path is yielded as it is.

    Raises:
        RepositoryError: The store cannot be read or written, or somebody changed the config meanwhile.
        RuntimeUnavailableError: fsspec, or its driver for this kind of URL, is not installed.
    """
    if not is_url(repository):
        yield Path(repository)
        return
    check_name(name, None)
    store, root = _connect(str(repository))
    place = f"{root.rstrip('/')}/{name}"
    with tempfile.TemporaryDirectory(prefix="trtdeploy-repository-") as temporary:
        local = Path(temporary) / "models"
        local.mkdir()
        try:
            there = _download(store, place, local / name)
            _download_other_configs(store, root.rstrip("/"), local, name)
            before = {path: sha256_file(local / name / path) for path in there}
            yield local
            _upload(store, place, local / name, before)
        except (OSError, ValueError) as error:
            raise RepositoryError(f"The model repository {repository} cannot be used: {error}.") from error


def _connect(url: str) -> tuple[Any, str]:
    try:
        import fsspec

        store, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"{url} needs fsspec and its driver for this kind of store: {error}.",
            hint="pip install 'trtdeploy[remote]', and s3fs, gcsfs or what the URL needs",
        ) from error
    except ValueError as error:
        raise RepositoryError(f"{url} is no URL that fsspec knows: {error}.") from error
    return store, str(root)


def _download(store: Any, place: str, folder: Path) -> list[str]:
    store.invalidate_cache()
    if not store.exists(place):
        return []
    base = str(store._strip_protocol(place)).strip("/")
    found = []
    for path in store.find(place):
        relative = str(path).strip("/").removeprefix(base).lstrip("/")
        target = folder / relative
        if not target.resolve().is_relative_to(folder.resolve()):
            raise RepositoryError(f"{path} leads out of the repository.")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(store.cat_file(path))
        found.append(relative)
    return found


def _download_other_configs(store: Any, root: str, local: Path, name: str) -> None:
    """Fetch the configs of the other models: an ensemble among them may run this one."""
    for path in store.glob(f"{root}/*/{CONFIG_FILE}"):
        other = str(path).rsplit("/", 2)[1]
        if other != name and not other.startswith("."):
            (local / other).mkdir()
            (local / other / CONFIG_FILE).write_bytes(store.cat_file(path))


def _upload(store: Any, place: str, folder: Path, before: dict[str, str]) -> None:
    now = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    changed = [name for name, path in sorted(now.items()) if before.get(name) != sha256_file(path)]
    gone = sorted(before.keys() - now.keys())
    _check_config_unchanged(store, place, CONFIG_FILE in before, before.get(CONFIG_FILE))
    old = {int(name.split("/")[0]) for name in before if name.split("/")[0].isdigit()}
    named = set(read_config(folder).version_policy.specific.versions) or set(versions(folder))
    config_first = CONFIG_FILE in before and named <= old
    rank = {CONFIG_FILE: 0 if config_first else 3, HISTORY_FILE: 2}
    for name in sorted(changed, key=lambda name: (rank.get(name, 1), name)):
        target = f"{place}/{name}"
        store.makedirs(target.rpartition("/")[0], exist_ok=True)
        store.pipe_file(target, now[name].read_bytes())
    for name in gone:
        store.rm_file(f"{place}/{name}")


def _check_config_unchanged(store: Any, place: str, was_there: bool, digest: str | None) -> None:
    from trtdeploy.files import sha256_bytes

    store.invalidate_cache()
    path = f"{place}/{CONFIG_FILE}"
    there = store.exists(path)
    if there != was_there or (there and sha256_bytes(store.cat_file(path)) != digest):
        raise RepositoryError(f"{path} was changed by somebody else meanwhile.", hint="Look at it, and try again.")
