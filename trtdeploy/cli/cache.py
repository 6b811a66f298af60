"""``trtdeploy cache show`` and ``trtdeploy cache merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from trtdeploy.cli.console import Output, door, print_json
from trtdeploy.cli.plans import AsJson

Files = Annotated[list[Path], typer.Argument(dir_okay=False, help="Timing caches.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    cache = typer.Typer(no_args_is_help=True, help="Look at timing caches, and merge them.")
    cache.command()(show)
    cache.command()(merge)
    app.add_typer(cache, name="cache")


def show(files: Files, as_json: AsJson = False) -> None:
    """Say what timing caches are and whose; exit code 1 if one is damaged."""
    with door():
        from trtdeploy.building.cache_files import cache_facts

        facts = [cache_facts(path) for path in files]
        if as_json:
            print_json([fact.model_dump(mode="json") for fact in facts])
        else:
            table = Table("file", "kind", "health", "runtime", "device", "entries", "bytes", "updated", box=None)
            for fact in facts:
                table.add_row(
                    fact.file,
                    fact.kind or "unknown",
                    fact.health,
                    "\n".join(fact.runtimes) or "unknown",
                    "\n".join(fact.devices) or "unknown",
                    "unknown" if fact.entries is None else str(fact.entries),
                    str(fact.nbytes),
                    fact.updated_at,
                )
            Output().print(table)
        if any(fact.health == "corrupt" for fact in facts):
            raise typer.Exit(1)


def merge(
    files: Files,
    output: Annotated[
        Path, typer.Option("--output", "-o", dir_okay=False, help="The merged cache; if it exists, it is merged, too.")
    ],
    as_json: AsJson = False,
) -> None:
    """Merge timing caches of one runtime version on one kind of device."""
    with door():
        from trtdeploy.building.cache_files import merge_caches

        fact = merge_caches(files, output)
        if as_json:
            print_json(fact.model_dump(mode="json"))
        else:
            typer.echo(f"{fact.file}: {fact.kind}, {fact.entries} entries, {fact.nbytes} bytes")
