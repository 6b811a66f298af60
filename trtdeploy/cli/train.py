"""``trtdeploy train``: the commands of ``training``."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import typer

_ARGUMENTS_AS_THEY_ARE = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(context_settings=_ARGUMENTS_AS_THEY_ARE)(train)


def train(context: typer.Context) -> None:
    """Train, calibrate (PTQ), fine-tune (QAT) and export networks: fit, calibrate, qat, export, evaluate, ..."""
    _take_our_own("training")
    import_module("training.cli.main").main(context.args, name="trtdeploy train")


def _take_our_own(package: str) -> None:
    """Import the package that is installed beside this one, not what is called so in a folder on the path."""
    file = Path(__file__).parents[2] / package / "__init__.py"
    if getattr(sys.modules.get(package), "__file__", None) == str(file):
        return
    spec = spec_from_file_location(package, file, submodule_search_locations=[str(file.parent)])
    assert spec is not None  # as for every file that ends in .py
    assert spec.loader is not None
    module = sys.modules[package] = module_from_spec(spec)
    spec.loader.exec_module(module)
