"""A repository behind a URL of fsspec: the same steps, and no half version at any moment of an upload."""

from __future__ import annotations

import errno
import functools
import json
import signal
import threading
import uuid
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper
from typer.testing import CliRunner

from trtdeploy.building.build import BuildConfig, build
from trtdeploy.cli import console
from trtdeploy.cli.main import app
from trtdeploy.errors import RepositoryError
from trtdeploy.files import sha256_bytes
from trtdeploy.plan import Plan
from trtdeploy.triton.config import check_config
from trtdeploy.triton.repository import remote
from trtdeploy.triton.repository.remote import checked_out
from trtdeploy.triton.repository.versions import list_versions, promote, prune, publish, rollback

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


def files_of(url: str) -> dict[str, bytes]:
    store, base = fsspec.core.url_to_fs(url)
    return {str(path).partition("/models/m/")[2]: store.cat_file(path) for path in store.find(base)}


def whole_version(files: dict[str, bytes], number: int) -> bool:
    """Whether the plan and the manifest of a version are one another's, and the list of versions has it."""
    manifest = json.loads(files[f"{number}/engine.plan.json"])
    listed = json.loads(files["versions.json"])["versions"]
    digest = sha256_bytes(files[f"{number}/engine.plan"])
    return bool(manifest["plan_sha256"] == digest == listed[str(number)]["plan_sha256"])


@pytest.fixture(scope="module")
def other_plan(qdq_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan of the same classifier with the opposite scores."""
    folder = tmp_path_factory.mktemp("other")
    model = onnx.load(qdq_onnx)
    model.graph.node[-1].output[0] = "positive"
    model.graph.node.append(helper.make_node("Neg", ["positive"], ["logits"]))
    onnx.save(model, folder / "other.onnx")
    return build(folder / "other.onnx", folder / "other.plan", BuildConfig(timing_rounds=1))


def try_to_add(plan: Plan, url: str) -> int | None:
    """Return the version, or None where the publisher was told that somebody else was faster."""
    try:
        return add(plan, url)
    except RepositoryError as error:
        changed = "by somebody else meanwhile" in error.message and "run the command again" in str(error)
        if not changed and f"{url}/m holds files and no config.pbtxt" not in error.message:
            raise
        return None


@pytest.mark.parametrize(("first", "moment"), [*((True, at) for at in range(9)), *((False, at) for at in range(7))])
def test_of_two_publishers_each_version_stands_or_is_refused(
    first: bool, moment: int, url: str, qdq_plan: Plan, other_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One publishes while the other one is between two writes of his upload; nothing is lost without a word."""
    if not first:
        add(qdq_plan, url)
    store, _ = fsspec.core.url_to_fs(url)
    write, check = type(store).pipe_file, remote._check_unchanged
    results: list[int | None] = []
    steps = 0

    def meanwhile() -> None:
        nonlocal steps
        steps += 1
        if steps == moment + 1:
            results.append(try_to_add(other_plan, url))

    @functools.wraps(write)
    def interrupted(self: Any, path: str, *arguments: Any, **options: Any) -> None:
        if not path.endswith(("versions.json", "m/config.pbtxt")):
            meanwhile()  # right before the write: all looks are behind us
        write(self, path, *arguments, **options)

    def looking(*arguments: Any) -> None:
        meanwhile()
        check(*arguments)

    monkeypatch.setattr(type(store), "pipe_file", interrupted)
    monkeypatch.setattr(remote, "_check_unchanged", looking)
    results.append(try_to_add(qdq_plan, url))
    assert len(results) == 2
    done = [number for number in results if number is not None]
    assert done, "one of the two is through"
    assert len(set(done)) == len(done)
    expected = sorted([*done, *([] if first else [1])])
    files = files_of(url)
    assert sorted({int(name.split("/")[0]) for name in files if name[0].isdigit()}) == expected
    assert all(whole_version(files, number) for number in expected)
    assert active(url) == [1 if not first else done[0]]
    monkeypatch.undo()
    again = add(qdq_plan, url)
    assert again == max(expected) + 1
    assert whole_version(files_of(url), again)


@pytest.mark.parametrize("moment", range(6))
def test_a_sigterm_takes_the_version_back(
    moment: int, url: str, qdq_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(qdq_plan, url)
    before = files_of(url)
    store, _ = fsspec.core.url_to_fs(url)
    write, written = type(store).pipe_file, []

    @functools.wraps(write)
    def stopped(self: Any, path: str, *arguments: Any, **options: Any) -> None:
        if len(written) == moment:
            signal.raise_signal(signal.SIGTERM)
        written.append(path)
        write(self, path, *arguments, **options)

    monkeypatch.setattr(type(store), "pipe_file", stopped)
    monkeypatch.setattr(console, "_interrupted", threading.Event())
    handler = signal.getsignal(signal.SIGTERM)
    try:
        done = CliRunner().invoke(app, ["publish", str(qdq_plan.path), "--name", "m", "--repository", url])
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert (done.exit_code, "Stopped." in done.stderr) == (130, True)
    assert len(written) == moment
    assert files_of(url) == before


def test_a_look_writes_nothing(url: str, qdq_plan: Plan) -> None:
    add(qdq_plan, url)
    with checked_out(url, "m") as root:
        list_versions(root, "m")
        add(qdq_plan, url)  # by somebody else: no business of ours
    assert len(json.loads(files_of(url)["versions.json"])["versions"]) == 2


@pytest.mark.parametrize("kept", ["create", "silent", "unknown"])
def test_stores_differ_in_exclusive_creation(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    write, path = type(store).pipe_file, f"/{uuid.uuid4().hex}/1/a"

    def without_mode(self: Any, path: str, value: bytes) -> None:
        write(self, path, value)

    def unknown(self: Any, path: str, value: bytes, mode: str = "overwrite") -> None:
        if mode == "create":
            raise OSError(errno.ENOSYS, "A header you provided implies functionality that is not implemented")
        write(self, path, value)

    if kept != "create":
        monkeypatch.setattr(type(store), "pipe_file", without_mode if kept == "silent" else unknown)
    remote._create(store, path, b"ours")
    with pytest.raises(RepositoryError, match="written by somebody else"):
        remote._create(store, path, b"theirs")
    assert store.cat_file(path) == b"ours"


@pytest.mark.parametrize("command", ["package", "package --check", "serve", "check"])
def test_commands_that_need_a_folder_refuse_a_url(
    command: str, qdq_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *flags = command.split()
    where = ["--name", "m", "--repository"] if name == "package" else []
    plan = [str(qdq_plan.path)] if name == "package" else []
    done = CliRunner().invoke(app, [name, *plan, *flags, *where, "s3://bucket/models"], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert "s3://bucket/models is a URL" in done.stderr
    assert list(tmp_path.iterdir()) == []


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
