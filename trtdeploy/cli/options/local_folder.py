"""A repository that has to be a folder of this machine."""

from __future__ import annotations

import re
from pathlib import Path

import typer

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a Path has made one slash of two


def local_folder(value: Path) -> Path:
    """Refuse a URL, which would otherwise name a folder here that is called after it; for ``typer.Option``."""
    if _URL.match(str(value)):
        raise typer.BadParameter(
            f"{str(value).replace(':/', '://', 1)} is a URL; this command works on a folder of this machine. "
            "trtdeploy publish, promote, rollback, versions and prune take URLs."
        )
    return value
