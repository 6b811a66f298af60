"""The snippets of pages of documentation, run in order in one folder, as a reader would run them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def snippets(page: Path) -> list[tuple[str, str]]:
    """Return language and text of what stands between fences."""
    return re.findall(r"^```(bash|python)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def steps(page: Path) -> list[tuple[str, str]]:
    """Return language and text of what a reader runs at once: a snippet, or each of its commands if it has no more.

    A test for each takes no longer than the longest command, however slow the machine.
    """
    found = []
    for language, text in snippets(page):
        commands = re.split(r"(?<!\\)\n", text.strip())
        if language == "bash" and all(command.startswith(("python ", "trtdeploy ")) for command in commands):
            found += [(language, command) for command in commands]
        else:
            found.append((language, text))
    return found


def run(command: list[str], folder: Path) -> None:
    # without a limit of its own: pytest's ends what hangs
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
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
        assert process.wait(timeout=300) == 0


class Reader:
    """Works through pages, step by step, in one folder.

    A server that a step starts runs until the end of its page. The reader's ports are free; a test must not rely on
    that, so that the server takes others.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._servers = ExitStack()
        self._urls: dict[str, str] = {}
        self._page: Path | None = None
        self._read: dict[Path, int] = {}
        self._stuck: dict[Path, str] = {}

    def read(self, page: Path, last: int | None = None) -> None:
        """Run a page's steps up to number ``last``, or to its end; those that were run are not run again."""
        if page in self._stuck:
            pytest.fail(f"{page.name} stopped at: {self._stuck[page]}")
        wanted = steps(page) if last is None else steps(page)[: last + 1]
        for language, text in wanted[self._read.get(page, 0) :]:
            if page != self._page:
                self.close()
                self._page = page
            self._stuck[page] = text
            self._run(language, text)
            del self._stuck[page]
            self._read[page] = self._read.get(page, 0) + 1

    def close(self) -> None:
        """End the servers of the page."""
        self._urls.clear()
        self._servers.close()

    def _run(self, language: str, text: str) -> None:
        for reader, real in self._urls.items():
            text = text.replace(reader, real)
        if language == "python":
            run([sys.executable, "-c", text], self._folder)
        elif text.startswith("trtdeploy serve "):
            ready = self._servers.enter_context(background_server(text, self._folder))
            found = re.search(r"(http://\S+) and (grpc://\S+)", ready)
            assert found is not None, ready
            self._urls = {"http://127.0.0.1:8000": found[1], "grpc://127.0.0.1:8001": found[2]}
        else:
            run(["bash", "-euc", text], self._folder)
