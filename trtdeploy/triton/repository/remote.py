"""A model repository behind a URL (S3, GCS, any file system of fsspec): work on a copy, then upload what has changed.

Object stores have no rename. No reader sees half a version nevertheless, by the order of the writes: a config only ever
names versions that are complete. Where the new config names versions that are there already, it goes first; the config
of a new model goes last, after all that it names. Versions are deleted after that.

There is no lock either. A file of a new version is only ever created, so that two publishers never mix in one version,
and the second one gives up. Before each write of ``config.pbtxt`` and ``versions.json`` both are compared with what was
there when the copy was taken; whoever finds another one gives up, and takes back the version that he was adding. What
is left is the moment between that look and the one write: who changes the same file then is overwritten. Where the
driver or the store has no exclusive creation (S3 and GCS have it), such a moment is also before each file of a version.
"""

from __future__ import annotations

import errno
import inspect
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trtdeploy.errors import RepositoryError, RuntimeUnavailableError
from trtdeploy.files import sha256_bytes, sha256_file
from trtdeploy.triton.repository.history import HISTORY_FILE
from trtdeploy.triton.repository.layout import CONFIG_FILE, check_name, read_config, versions

logger = logging.getLogger(__name__)


def is_url(repository: str | Path) -> bool:
    """Say whether a repository is a URL of fsspec and no local path."""
    return isinstance(repository, str) and "://" in repository


@contextmanager
def checked_out(repository: str | Path, name: str) -> Iterator[Path]:
    """Yield a local repository with this model; at the end of a block without an error, what has changed is uploaded.

    Of the other models only the configs are there, and stay as they are. A local path is yielded as it is.

    Raises:
        RepositoryError: The store cannot be read or written, or somebody changed the model meanwhile: run it again.
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
            if there and CONFIG_FILE not in there:
                raise RepositoryError(
                    f"{str(repository).rstrip('/')}/{name} holds files and no {CONFIG_FILE}: somebody is adding the "
                    "first version right now, or was killed at it.",
                    hint="Try again in a moment; if nobody is at it, remove the folder.",
                )
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
    if not changed and not gone:
        return
    old = {_version(name) for name in before} - {None}
    new = {_version(name) for name in now} - {None} - old
    named = set(read_config(folder).version_policy.specific.versions) or set(versions(folder))
    config_first = CONFIG_FILE in before and named <= old
    rank = {CONFIG_FILE: 0 if config_first else 4, HISTORY_FILE: 3}
    known = {name: before.get(name) for name in (CONFIG_FILE, HISTORY_FILE)}
    _check_unchanged(store, place, known)
    created: list[str] = []
    try:
        for name in sorted(changed, key=lambda name: (rank.get(name, 1 if _version(name) in new else 2), name)):
            target = f"{place}/{name}"
            store.makedirs(target.rpartition("/")[0], exist_ok=True)
            if name in known:
                _check_unchanged(store, place, known)
                if name == CONFIG_FILE and not config_first:
                    created.clear()  # from here on they may be served
                known[name] = sha256_file(now[name])
                store.pipe_file(target, now[name].read_bytes())
            elif _version(name) in new:
                _create(store, target, now[name].read_bytes())
                created.append(target)
            else:
                store.pipe_file(target, now[name].read_bytes())
    except BaseException:
        _take_back(store, created)
        raise
    for name in gone:
        store.rm_file(f"{place}/{name}")


def _version(name: str) -> int | None:
    """Return the version that a file of a model belongs to; None if it is the model's own."""
    number = name.partition("/")[0]
    return int(number) if number.isdecimal() else None


def _check_unchanged(store: Any, place: str, known: Mapping[str, str | None]) -> None:
    """Refuse to go on if a file is another one in the store than the one whose digest is given; None is no file."""
    store.invalidate_cache()
    for name, digest in known.items():
        path = f"{place}/{name}"
        if (sha256_bytes(store.cat_file(path)) if store.exists(path) else None) != digest:
            raise _lost(path, "changed")


def _create(store: Any, path: str, content: bytes) -> None:
    """Write a file that is not there; a store that can create exclusively lets no two publishers succeed.

    Source: fsspec's documentation, "Exclusive write"; ``mode`` came with fsspec 2024.12, and not every driver has it.
    """
    store.invalidate_cache()
    if store.exists(path):
        raise _lost(path, "written")
    if "mode" in inspect.signature(store.pipe_file).parameters:
        try:
            store.pipe_file(path, content, mode="create")
            return
        except FileExistsError as error:
            raise _lost(path, "written") from error
        except OSError as error:
            if error.errno != errno.ENOSYS:  # what speaks S3 need not know all of it
                raise
    store.pipe_file(path, content)


def _lost(path: str, what: str) -> RepositoryError:
    return RepositoryError(
        f"{path} was {what} by somebody else meanwhile.",
        hint="What he did stands. Look at the model's versions, and run the command again.",
    )


def _take_back(store: Any, created: list[str]) -> None:
    """Remove the files of versions that no config names, after an error that is on its way."""
    for path in created:
        try:
            store.rm_file(path)
        except Exception as error:  # each driver has its own kinds
            logger.warning("%s is left of a version that was not published: %s", path, error)
