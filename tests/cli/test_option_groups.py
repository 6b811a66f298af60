"""Dataclasses as groups of a command's options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from trtdeploy.cli.options.groups import with_option_groups


@dataclass(frozen=True)
class Size:
    height: Annotated[int, typer.Option("--height", min=1, help="How high.")]
    width: Annotated[int, typer.Option("--width", help="How wide.", rich_help_panel="Sizes")] = 7
    tags: Annotated[list[str] | None, typer.Option("--tag")] = None


def command(seen: list[Any]) -> typer.Typer:
    def draw(
        name: Annotated[str, typer.Argument(help="Whose.")],
        size: Size,
        dark: Annotated[bool, typer.Option("--dark")] = False,
    ) -> None:
        """Draw something."""
        seen.append((name, size, dark))

    app = typer.Typer(add_completion=False)
    app.command()(with_option_groups(draw))
    return app


def test_the_fields_are_options_and_come_as_one_argument() -> None:
    seen: list[Any] = []
    app = command(seen)
    arguments = ["box", "--height", "3", "--dark", "--tag", "a", "--tag", "b"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert CliRunner().invoke(app, ["box", "--width", "2", "--height", "1"]).exit_code == 0
    (name, size, dark), (_, other, bright) = seen
    assert (name, size, dark, bright) == ("box", Size(3, 7, ["a", "b"]), True, False)
    assert (other.height, other.width, list(other.tags or ())) == (1, 2, [])


@pytest.mark.parametrize("arguments", [["box"], ["box", "--height", "0"], ["box", "--height", "x"], ["--height", "1"]])
def test_what_typer_refuses_is_refused(arguments: list[str]) -> None:
    seen: list[Any] = []
    assert CliRunner().invoke(command(seen), arguments).exit_code == 2
    assert not seen


def test_the_help_shows_them() -> None:
    shown = CliRunner().invoke(command([]), ["--help"]).stdout
    for words in ("Draw something", "--height", "How high", "Sizes", "--width", "--dark"):
        assert words in shown
