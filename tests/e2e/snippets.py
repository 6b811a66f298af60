"""The snippets of a page of documentation, run in order in one folder, as a reader would run them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def snippets(page: Path) -> list[tuple[str, str]]:
    """Return language and text of what stands between fences."""
    return re.findall(r"^```(bash|python)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


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


def run_page(page: Path, folder: Path) -> None:
    """Run every snippet; a server that one of them starts runs until the end of the page.

    The reader's ports are free; a test must not rely on that, so that the server takes others.
    """
    urls = {}
    with ExitStack() as stack:
        for language, text in snippets(page):
            for reader, real in urls.items():
                text = text.replace(reader, real)
            if language == "python":
                run([sys.executable, "-c", text], folder)
                continue
            *lines, last = text.strip().splitlines()
            serves = last.startswith("trtdeploy serve ")
            if lines or not serves:
                run(["bash", "-euc", "\n".join(lines) if serves else text], folder)
            if serves:
                ready = stack.enter_context(background_server(last, folder))
                found = re.search(r"(http://\S+) and (grpc://\S+)", ready)
                assert found is not None, ready
                urls = {"http://127.0.0.1:8000": found[1], "grpc://127.0.0.1:8001": found[2]}
