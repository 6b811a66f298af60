from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trtdeploy.errors import RuntimeUnavailableError
from trtdeploy.triton.server import installation
from trtdeploy.triton.server.installation import Installation, cache_folder, find_tritonserver

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with an empty PATH, no container and an empty cache folder."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("TRTDEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(installation, "_CONTAINER_SERVER", tmp_path / "container" / "tritonserver")
    return tmp_path


def test_the_given_path_wins(no_server: Path) -> None:
    executable(no_server / "bin" / "tritonserver")
    mine = executable(no_server / "mine")
    assert find_tritonserver(mine) == Installation(mine, "--tritonserver")


@pytest.mark.parametrize("kind", ["missing", "folder", "not-executable"])
def test_a_path_that_cannot_be_started_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "server"
    if kind == "folder":
        path.mkdir()
    elif kind == "not-executable":
        path.write_text("")
    with pytest.raises(RuntimeUnavailableError, match=r"server is not an executable tritonserver") as caught:
        find_tritonserver(path)
    assert caught.value.exit_code == 3


def test_the_path_comes_before_the_container(no_server: Path) -> None:
    container = executable(no_server / "container" / "tritonserver")
    assert find_tritonserver() == Installation(container, "container")
    on_path = executable(no_server / "bin" / "tritonserver")
    assert find_tritonserver() == Installation(on_path, "PATH")


def test_a_machine_without_a_server_is_told_how_to_get_one(no_server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'trtdeploy\[server\]'") as caught:
        find_tritonserver()
    assert caught.value.exit_code == 3


def test_the_wheel_is_prepared_once_and_shared(no_server: Path) -> None:
    pytest.importorskip("pytriton")
    found: list[Installation] = []
    threads = [threading.Thread(target=lambda: found.append(find_tritonserver())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4
    assert all(server == found[0] for server in found)
    server = found[0]
    assert server.backends is not None
    assert server.backends.parent == no_server / "cache"
    stub = server.backends / "python" / "triton_python_backend_stub"
    assert stub.stat().st_mode & stat.S_IXUSR
    assert server.backends.stat().st_mode & 0o777 == 0o755
    visible = [path.name for path in (no_server / "cache").iterdir() if not path.name.endswith(".lock")]
    assert visible == [server.backends.name]
    before = stub.stat().st_mtime_ns, stub.stat().st_ino
    assert find_tritonserver() == server
    assert (stub.stat().st_mtime_ns, stub.stat().st_ino) == before


def test_the_wheels_server_starts_and_finds_its_libraries_and_python(no_server: Path) -> None:
    pytest.importorskip("pytriton")
    server = find_tritonserver()
    environment = {**os.environ, **server.environment}
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    done = subprocess.run(
        [server.binary, "--help"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert "--model-repository" in done.stdout + done.stderr


def test_a_wheel_without_a_stub_for_this_python_says_so(no_server: Path) -> None:
    (no_server / "wheel" / "python_backend_stubs" / "3.4").mkdir(parents=True)
    with pytest.raises(RuntimeUnavailableError, match=rf"no Python backend for Python {PYTHON}; it has 3\.4"):
        installation._prepare_wheel(no_server / "wheel")


def test_a_failed_preparation_leaves_nothing(no_server: Path) -> None:
    pytest.importorskip("pytriton")
    wheel = no_server / "wheel"
    executable(wheel / "python_backend_stubs" / PYTHON / "triton_python_backend_stub")  # and no backends to copy
    with pytest.raises(OSError, match="backends"):
        installation._prepare_wheel(wheel)
    assert all(path.name.endswith(".lock") for path in (no_server / "cache").iterdir())


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRTDEPLOY_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("TRTDEPLOY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "trtdeploy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "trtdeploy"
