"""What the commands show: progress on stderr, facts on stdout, one clear message for an error."""

from __future__ import annotations

import json
import logging
import sys
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


@contextmanager
def door() -> Iterator[None]:
    """Turn the errors of a command into one message on stderr and its exit code, never a traceback."""
    try:
        yield
    except TrtDeployError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    except ValidationError as error:
        first = error.errors()[0]
        typer.echo(f"error: {'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r}).", err=True)
        raise typer.Exit(TrtDeployError.exit_code) from error
    except OSError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(TrtDeployError.exit_code) from error
    except KeyboardInterrupt as error:
        typer.echo(f"\n{str(error) or 'Interrupted.'}", err=True)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from error


def show_warnings() -> None:
    """Send warnings of this project, and of nobody else, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.getLogger("trtdeploy").addHandler(handler)
    logging.getLogger("training").addHandler(handler)


def print_json(facts: Any) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(facts, indent=2))


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """End on a signal as on Ctrl-C; for ``signal.signal``."""
    raise KeyboardInterrupt("Stopped.")


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
