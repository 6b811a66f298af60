"""``trtdeploy package``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtdeploy.cli.console import door, print_json

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(package)


def package(
    plan: Annotated[Path, typer.Argument(dir_okay=False, help="A plan; its manifest PLAN.json must lie beside it.")],
    name: Annotated[str, typer.Option("--name", help="Model name in Triton.")],
    repository: Annotated[Path, typer.Option("--repository", help="The model repository; made if it is not there.")],
    version: Annotated[int | None, typer.Option("--version", help="Version [default: the next free one].")] = None,
    max_batch_size: Annotated[
        int | None,
        typer.Option("--max-batch-size", min=1, help="Largest batch [default: from the plan's profiles, else 32]."),
    ] = None,
    instances: Annotated[int, typer.Option("--instances", min=1, help="Copies of the model that run at a time.")] = 1,
    contexts: Annotated[int, typer.Option("--contexts", min=1, help="Execution contexts in each instance.")] = 1,
    max_queue_delay_us: Annotated[
        int,
        typer.Option("--max-queue-delay-us", min=0, help="How long a request may wait for others, in microseconds."),
    ] = 0,
    ensemble: Annotated[
        bool,
        typer.Option("--ensemble", help="Also NAME_pipeline: JPEG or PNG bytes in, labels and probabilities out."),
    ] = False,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="How many labels NAME_pipeline answers with.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Add a plan to a Triton model repository, as a new version that appears as a whole."""
    with door():
        from trtdeploy.triton.config import PackageOptions
        from trtdeploy.triton.pipeline import package_pipeline
        from trtdeploy.triton.repository import package as run

        options = PackageOptions(
            max_batch_size=max_batch_size,
            instances=instances,
            contexts=contexts,
            max_queue_delay_us=max_queue_delay_us,
        )
        pipeline = None
        if ensemble:
            whole = package_pipeline(plan, repository, name, version=version, options=options, top_k=top_k)
            packaged, pipeline = whole.model, whole.pipeline
        else:
            packaged = run(plan, repository, name, version=version, options=options)
        facts = {"name": packaged.name, "version": packaged.version, "folder": str(packaged.folder)}
        if pipeline is not None:
            facts["pipeline"] = pipeline
        if as_json:
            print_json(facts)
        else:
            typer.echo(f"{packaged.folder}: version {packaged.version}")
            if pipeline is not None:
                typer.echo(f"{pipeline} takes image files and answers with labels")
