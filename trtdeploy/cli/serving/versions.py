"""``trtdeploy promote``, ``rollback``, ``versions``, ``prune`` and ``check``: what is in a model repository."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trtdeploy.cli.console import door, finite_seconds, interrupt, print_json
from trtdeploy.cli.options.connection import ConnectionFlags
from trtdeploy.cli.options.groups import with_option_groups
from trtdeploy.cli.options.local_folder import local_folder
from trtdeploy.errors import GateError, UsageError

if TYPE_CHECKING:
    from trtdeploy.triton.repository.history import Step

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Name = Annotated[str, typer.Option("--name", help="Model name in Triton.")]
Repository = Annotated[str, typer.Option("--repository", help="The model repository, or its URL (s3://...).")]
Url = Annotated[
    str | None,
    typer.Option("--url", help="http(s)://HOST:PORT of an explicit-mode server: test there, then exchange."),
]
LoadTimeout = Annotated[
    float,
    typer.Option("--timeout", min=0.001, callback=finite_seconds, help="Seconds that one load on the server may take."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a config that was edited by hand.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(with_option_groups(promote))
    app.command()(with_option_groups(rollback))
    app.command()(versions)
    app.command()(prune)
    app.command()(with_option_groups(check))


def promote(
    name: Name,
    repository: Repository,
    version: Annotated[int | None, typer.Option("--version", min=1, help="Version (default: the newest).")] = None,
    url: Url = None,
    timeout: LoadTimeout = 120.0,
    force: Force = False,
    as_json: AsJson = False,
    *,
    connection: ConnectionFlags,
) -> None:
    """Make a version the one that is served; on a running server too if --url is given."""
    with door():
        _change("promote", name, repository, version, url, timeout, force, as_json, connection)


def rollback(
    name: Name,
    repository: Repository,
    version: Annotated[
        int | None, typer.Option("--version", min=1, help="Version (default: the one that was active before).")
    ] = None,
    url: Url = None,
    timeout: LoadTimeout = 120.0,
    force: Force = False,
    as_json: AsJson = False,
    *,
    connection: ConnectionFlags,
) -> None:
    """Make the version the one that is served that was so before."""
    with door():
        _change("rollback", name, repository, version, url, timeout, force, as_json, connection)


def _change(
    step: Step,
    name: str,
    repository: str,
    version: int | None,
    url: str | None,
    timeout: float,
    force: bool,
    as_json: bool,
    connection: ConnectionFlags,
) -> None:
    from trtdeploy.triton.repository import versions as offline
    from trtdeploy.triton.repository.live_promotion import promote_live
    from trtdeploy.triton.repository.remote import checked_out, is_url

    if url is not None and is_url(repository):
        raise UsageError(
            f"--url tests and exchanges versions on a server of a local repository; {repository} is remote.",
            hint="Promote without --url, then let the server load the model.",
        )
    options = connection.options_for(url)
    if url is not None:
        signal.signal(signal.SIGTERM, interrupt)  # what the server was told of has to be taken back
    with checked_out(repository, name) as root:
        if url is not None:
            done = promote_live(
                root, name, version, url=url, timeout_s=timeout, step=step, force=force, options=options
            )
        elif step == "rollback":
            done = offline.rollback(root, name, version, force=force)
        else:
            done = offline.promote(root, name, version, force=force)
    if as_json:
        facts = {"name": done.name, "version": done.version, "before": done.before, "url": url}
        print_json({**facts, "answered_by": done.answered_by})
    else:
        where = f"serves on {url}" if url else "is served from the next load on"
        if done.answered_by:
            where += " and has answered the known sample"
        typer.echo(f"{done.name}: version {done.version} {where}; before: {done.before}")


def versions(
    name: Name,
    repository: Repository,
    history: Annotated[
        bool, typer.Option("--history", help="List what was done instead, and which version then answered.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the versions of a model, and which one is served."""
    with door():
        from trtdeploy.triton.repository.history import read_history
        from trtdeploy.triton.repository.layout import model_folder
        from trtdeploy.triton.repository.remote import checked_out
        from trtdeploy.triton.repository.versions import list_versions

        with checked_out(repository, name) as root:
            listed = list_versions(root, name)
            events = read_history(model_folder(root, name)).events
        if history and as_json:
            print_json([event.model_dump(mode="json") for event in events])
            return
        if history:
            for event in events:
                answers = (f"version {number} has answered" for number in event.answered_by or ())
                before = "-" if event.before is None else event.before
                typer.echo("  ".join([f"{event.at}  {event.step:8} {event.version}  before: {before}", *answers]))
            return
        if as_json:
            print_json(
                [
                    {
                        "version": entry.version,
                        "active": entry.active,
                        "facts": entry.facts.model_dump(mode="json") if entry.facts is not None else None,
                    }
                    for entry in listed
                ]
            )
            return
        for entry in listed:
            facts = entry.facts
            known = "packaged, not published: nothing is recorded"
            if facts is not None:
                latency = f"{facts.latency_ms:.2f} ms" if facts.latency_ms is not None else "not measured"
                runtime = f"{facts.runtime['name']} {facts.runtime['version']}"
                known = f"plan {facts.plan_sha256[:12]}, {runtime}, latency {latency}, {facts.published_at}"
                if facts.accuracy:
                    scores = (f"{stage} {record['top1']:.2f} %" for stage, record in facts.accuracy.items())
                    known += ", top-1 " + ", ".join(scores)
            typer.echo(f"{entry.version:>4} {'active' if entry.active else '      '} {known}")


def prune(
    name: Name,
    repository: Repository,
    keep: Annotated[int, typer.Option("--keep", min=0, help="How many of the newest versions stay.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Remove old versions; those that are served, and the one to roll back to, stay."""
    with door():
        from trtdeploy.triton.repository.remote import checked_out
        from trtdeploy.triton.repository.versions import prune as run

        with checked_out(repository, name) as root:
            gone = run(root, name, keep=keep)
        if as_json:
            print_json({"removed": gone})
        else:
            typer.echo(f"removed: {', '.join(map(str, gone)) or 'none'}")


def check(
    repository: Annotated[Path, typer.Argument(callback=local_folder, help="A model repository.")],
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=0, help="GPUs of the server (default: those of this machine).")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", help="http(s)://HOST:PORT of its server: compare what is served with the repository."),
    ] = None,
    as_json: AsJson = False,
    *,
    connection: ConnectionFlags,
) -> None:
    """Check every model's config by Triton's rules, without a server; exit code 1 if it would refuse one.

    With --url also whether the server serves the versions that the repository names, and what a promotion that was
    killed has left there.
    """
    with door():
        from trtdeploy.triton.config import check_config
        from trtdeploy.triton.repository.differences.drift import find_drift
        from trtdeploy.triton.repository.layout import CONFIG_FILE, model_names, read_text

        found = [
            (name, finding)
            for name in model_names(repository)
            for finding in check_config(read_text(repository / name / CONFIG_FILE), repository / name, gpus=gpus)
        ]
        options = connection.options_for(url)
        if url is not None:
            found += find_drift(repository, url, options=options)
        if as_json:
            print_json(
                [
                    {
                        "model": name,
                        "severity": finding.severity,
                        "where": finding.where,
                        "message": finding.message,
                        "hint": finding.hint,
                    }
                    for name, finding in found
                ]
            )
        else:
            for name, finding in found:
                typer.echo(f"{name}: {finding}")
            if not found:
                typer.echo("nothing to complain about")
        if any(finding.severity == "error" for _, finding in found):
            raise typer.Exit(GateError.exit_code)
