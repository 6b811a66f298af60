"""``trtdeploy lint``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from trtdeploy.cli.console import door, print_json
from trtdeploy.cli.plans import AsJson
from trtdeploy.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(lint)


def lint(
    model: Annotated[Path, typer.Argument(dir_okay=False, help="An ONNX model with Q/DQ.")],
    ignore: Annotated[
        list[str] | None, typer.Option(help="Rule to leave out, by number or short name; may be given several times.")
    ] = None,
    fix: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Repair what needs no new data, write it here, and report what is left."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a model against TensorRT's rules of explicit INT8; exit code 1 if it breaks one."""
    with door():
        from trtdeploy.onnxgraph.lint import lint as findings_of
        from trtdeploy.onnxgraph.source import load_source

        proto = load_source(model).proto
        findings = findings_of(proto, ignore=ignore or ())
        if fix is not None:
            from trtdeploy.files import atomic_write
            from trtdeploy.onnxgraph.lint.fix import fix as repaired

            before = len(findings)
            proto = repaired(proto).model
            try:
                content = proto.SerializeToString()
            except ValueError as error:
                raise UsageError(f"{model} is too large to be written as one file: {error}.") from error
            atomic_write(fix, content)
            findings = findings_of(load_source(fix).proto, ignore=ignore or ())
            typer.echo(f"{fix}: {before} findings before, {len(findings)} left", err=True)
        if as_json:
            print_json([asdict(f) | {"id": f.id, "severity": f.severity, "remedy": f.remedy} for f in findings])
        else:
            for finding in findings:
                typer.echo(f"{finding.id} {finding.severity} {finding.node}: {finding.reason} [{finding.rule}]")
                typer.echo(f"     {finding.remedy}")
            typer.echo(f"{len(findings)} findings" if findings else f"{model}: no findings")
        if findings:
            raise typer.Exit(1)
