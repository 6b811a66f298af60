"""What the commands show: progress on stderr, facts on stdout, one clear message for an error."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


def print_facts(facts: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print the result on stdout, for people or as one JSON object."""
    typer.echo(json.dumps(facts) if as_json else text)


def log_to_stderr() -> None:
    """Show this package's warnings, and nobody else's remarks."""
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr, level=logging.WARNING)


class Display:
    """A progress bar on a terminal, plain lines elsewhere. Use it as a context manager.

    It is also the observer of ``training.loop.epochs`` (``step`` and ``epoch``).
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Take the bar away, so that what is printed next begins on a line of its own."""
        if self._console.is_terminal:
            self._bar.stop()

    def images(self, label: str) -> Callable[[int, int], None]:
        """Return a callback that shows how many images are done."""

        def advance(done: int, total: int) -> None:
            self._show(label, done, total, "images")

        return advance

    def step(self, *, epoch: int, epochs: int, step: int, steps: int, loss: float, images_per_s: float) -> None:
        """Show one training step."""
        self._show("training", step, steps, f"epoch {epoch}/{epochs}  loss {loss:.3f}  {images_per_s:.0f} images/s")

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Show one epoch as a line that stays."""
        self._console.print(
            f"epoch {metrics['epoch']}/{metrics['epochs']}  loss {metrics['loss']:.4f}  dev top-1 "
            f"{metrics['dev_top1']:.2f}%  {metrics['images_per_s']:.0f} images/s  {metrics['seconds']:.1f} s"
            f"{'  best so far' if metrics['best_epoch'] == metrics['epoch'] else ''}",
            highlight=False,
            soft_wrap=True,
        )

    def _show(self, label: str, done: int, total: int, detail: str) -> None:
        if not self._console.is_terminal:
            return
        if label not in self._tasks:
            self._tasks[label] = self._bar.add_task(label, total=total, detail=detail)
        self._bar.update(self._tasks[label], completed=done, total=total, detail=detail)
