"""What the commands show: progress on stderr, facts on stdout, one clear message for an error."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from trtdeploy.errors import TrtDeployError

INTERRUPTED_EXIT_CODE = 130
"""128 + SIGINT, as shells report it."""
_MAX_SECONDS = 1e7
_IMPORT_LOOK_S = 0.02
_FILE_COLUMNS = 160
READER_GONE_EXIT_CODE = 141
"""128 + SIGPIPE: whoever read our output has ended, as in ``trtdeploy inspect PLAN | head -1``."""


# Set by the first signal: what it interrupts may fail in ways of its own, an import for example.
_interrupted = threading.Event()


@contextmanager
def door() -> Iterator[None]:
    """Turn the errors of a command into one message on stderr and its exit code, never a traceback."""
    try:
        yield
    except typer.Exit:
        raise
    except BaseException as error:
        message, code = _explain(error)
        if message:
            typer.echo(message, err=True)
        raise typer.Exit(code) from error


def _explain(error: BaseException) -> tuple[str, int]:
    """Return the message and the exit code of an error; raise again what is a bug."""
    if isinstance(error, KeyboardInterrupt) or _interrupted.is_set():
        reason = str(error) if isinstance(error, KeyboardInterrupt) else ""
        return f"\n{reason or 'Interrupted.'}", INTERRUPTED_EXIT_CODE
    if isinstance(error, TrtDeployError):
        return f"error: {error}", error.exit_code
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return f"error: {where}: {first['msg']} (got {first['input']!r}).", TrtDeployError.exit_code
    if isinstance(error, BrokenPipeError):
        # what is still buffered would fail once more when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "", READER_GONE_EXIT_CODE
    if isinstance(error, OSError):
        return f"error: {error}", TrtDeployError.exit_code
    raise error


def show_warnings() -> None:
    """Send warnings of this project, and of nobody else, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handler.addFilter(_RuntimeMessages())
    logging.getLogger("trtdeploy").addHandler(handler)
    logging.getLogger("training").addHandler(handler)


class _RuntimeMessages(logging.Filter):
    """Of what a runtime logs: no errors, which come with the exception that they lead to; and each warning once."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name != "trtdeploy.tensorrt":
            return True
        text = record.getMessage()
        if record.levelno >= logging.ERROR or text in self._shown:
            return False
        self._shown.add(text)
        return True


def print_json(facts: Any) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(facts, indent=2))


class Output(Console):
    """stdout for tables: wide where it is no terminal; a reader that has ended is reported as by ``typer.echo``.

    Names of files and layers may hold brackets, so that nothing is taken for markup unless asked for.
    """

    def __init__(self, *, markup: bool = False, **options: Any) -> None:
        super().__init__(highlight=False, markup=markup, **options)
        if not self.is_terminal:
            self.width = _FILE_COLUMNS

    def on_broken_pipe(self) -> None:
        """Let ``door`` handle it; rich would exit with 1, which means here that a check failed."""
        raise BrokenPipeError


def finite_seconds(value: float) -> float:
    """Refuse a duration that is not a number, or that no clock can count; for ``typer.Option``."""
    if not (math.isfinite(value) and value <= _MAX_SECONDS):
        raise typer.BadParameter(f"{value:g} is not a number of seconds up to {_MAX_SECONDS:.0f}.")
    return value


def interrupt(number: int, frame: FrameType | None) -> None:
    """End on a signal as on Ctrl-C; for ``signal.signal``. One that comes during an import waits for its end."""
    _interrupted.set()
    if _in_import(frame):
        # an extension module that is being loaded may print an exception of its imports, or swallow it
        main_thread = threading.main_thread().ident
        # to this thread: a wait that it is in by then has to end
        again = threading.Timer(_IMPORT_LOOK_S, signal.pthread_kill, [main_thread, number])
        again.daemon = True
        again.start()
        return
    raise KeyboardInterrupt("Interrupted." if number == signal.SIGINT else "Stopped.")


def _in_import(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return True
        frame = frame.f_back
    return False


class Bars:
    """Progress bars on a terminal, nothing elsewhere. Use it as a context manager, or call ``finish``."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def show(self, label: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps of ``label`` are done."""
        if not self._console.is_terminal:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.start()
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(label, total=total)
        self._progress.update(self._tasks[label], completed=done, total=total)

    def labelled(self, label: str) -> Callable[[int, int], None]:
        """Return a callback for one label."""
        return lambda done, total: self.show(label, done, total)

    def finish(self) -> None:
        """Take the bars away; the next ``show`` begins anew."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = None
        self._tasks.clear()

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()
