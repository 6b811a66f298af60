"""A repository behind a URL of fsspec: the same steps, and no half version at any moment of an upload."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

from trtdeploy.errors import RepositoryError
from trtdeploy.plan import Plan
from trtdeploy.triton.config import check_config
from trtdeploy.triton.remote import checked_out
from trtdeploy.triton.versions import list_versions, promote, prune, publish, rollback

pytest.importorskip("tritonclient.grpc")
fsspec = pytest.importorskip("fsspec")


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4().hex}/models" if request.param == "memory" else f"file://{tmp_path}/models"


def add(plan: Plan, url: str) -> int:
    with checked_out(url, "m") as root:
        return publish(plan.path, root, "m").version


def active(url: str) -> list[int]:
    with checked_out(url, "m") as root:
        return [entry.version for entry in list_versions(root, "m") if entry.active]


def test_versions_live_behind_a_url(url: str, qdq_plan: Plan) -> None:
    assert (add(qdq_plan, url), active(url)) == (1, [1])
    assert (add(qdq_plan, url), active(url)) == (2, [1])
    with checked_out(url, "m") as root:
        promote(root, "m")
    assert active(url) == [2]
    with checked_out(url, "m") as root:
        assert rollback(root, "m").version == 1
    add(qdq_plan, url)
    with checked_out(url, "m") as root:
        assert prune(root, "m", keep=0) == [3]
    store, base = fsspec.core.url_to_fs(url)
    assert not [path for path in store.find(base) if "/3/" in path]
    assert active(url) == [1]


def test_a_reader_never_sees_half_a_version(
    url: str, qdq_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, base = fsspec.core.url_to_fs(url)
    write, seen = type(store).pipe_file, []

    def look(self: Any, path: str, *arguments: Any, **options: Any) -> None:
        write(self, path, *arguments, **options)
        seen.append(path)
        copy = tmp_path / f"seen-{len(seen)}" / "m"
        for file in self.find(base + "/m"):
            target = copy / str(file).partition("/models/m/")[2]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.cat_file(file))
        if (copy / "config.pbtxt").exists():
            found = check_config((copy / "config.pbtxt").read_text(), copy)
            assert not [finding for finding in found if finding.severity == "error"], path

    monkeypatch.setattr(type(store), "pipe_file", look)
    for _ in range(2):
        add(qdq_plan, url)
    with checked_out(url, "m") as root:
        promote(root, "m")
    assert len(seen) > 12


def test_a_change_by_somebody_else_is_not_overwritten(url: str, qdq_plan: Plan) -> None:
    add(qdq_plan, url)
    add(qdq_plan, url)
    store, base = fsspec.core.url_to_fs(url)

    def promote_while_somebody_edits() -> None:
        with checked_out(url, "m") as root:
            promote(root, "m")
            store.pipe_file(f"{base}/m/config.pbtxt", b"theirs")

    with pytest.raises(RepositoryError, match="changed by somebody else"):
        promote_while_somebody_edits()
    assert store.cat_file(f"{base}/m/config.pbtxt") == b"theirs"


def test_an_error_uploads_nothing(url: str, qdq_plan: Plan) -> None:
    add(qdq_plan, url)
    store, base = fsspec.core.url_to_fs(url)
    before = {path: store.cat_file(path) for path in store.find(base)}

    def publish_and_fail() -> None:
        with checked_out(url, "m") as root:
            publish(qdq_plan.path, root, "m")
            promote(root, "m", 9)

    with pytest.raises(RepositoryError, match="no version 9"):
        publish_and_fail()
    assert {path: store.cat_file(path) for path in store.find(base)} == before


def test_an_unknown_kind_of_url() -> None:
    with pytest.raises(RepositoryError, match="no URL that fsspec knows"), checked_out("nothing://a/b", "m"):
        pass
