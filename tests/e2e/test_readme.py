"""Every snippet of the README runs, in order, in one folder, as a reader would run it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def snippets() -> list[tuple[str, str]]:
    return re.findall(r"^```(bash|python)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@contextmanager
def background_server(command: str, folder: Path) -> Iterator[str]:
    """Run the serve command on free ports; yield the line that it prints when it is ready."""
    free = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    process = subprocess.Popen(
        [*command.split(), *free],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline()
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0


@pytest.mark.slow
def test_every_snippet_runs(tmp_path: Path) -> None:
    blocks = snippets()
    assert [language for language, _ in blocks] == ["bash", "bash", "python", "bash", "bash", "bash"]
    train, build, service, tensorrt, serve, validate = (text for _, text in blocks)
    run(["bash", "-euc", train], tmp_path)
    run(["bash", "-euc", build], tmp_path)
    run([sys.executable, "-c", service], tmp_path)
    run(["bash", "-euc", tensorrt], tmp_path)
    package_command, serve_command = serve.strip().splitlines()
    run(["bash", "-euc", package_command], tmp_path)
    with background_server(serve_command, tmp_path) as ready:
        url = re.search(r"grpc://\S+", ready)
        assert url is not None, ready
        # the reader's ports are free; a test must not rely on that
        run(["bash", "-euc", validate.replace("grpc://127.0.0.1:8001", url[0])], tmp_path)
