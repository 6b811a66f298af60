"""``trtdeploy lint``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtdeploy.cli.console import door, print_json
from trtdeploy.cli.plans import AsJson
from trtdeploy.counting import counted

if TYPE_CHECKING:
    from trtdeploy.onnxgraph.lint import Finding
    from trtdeploy.quantizing.lint_file import Repaired


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
    seed: Annotated[int, typer.Option(min=0, help="Of the random inputs that --fix compares the answers on.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check a model against TensorRT's rules of explicit INT8; exit code 1 if it breaks one."""
    with door():
        from trtdeploy.quantizing.lint_file import lint_file, repair_file

        repaired = None if fix is None else repair_file(model, fix, ignore=ignore or (), seed=seed)
        findings = lint_file(model, ignore=ignore or ()) if repaired is None else repaired.left
        if as_json:
            listed = [asdict(f) | {"id": f.id, "severity": f.severity, "remedy": f.remedy} for f in findings]
            print_json(listed if repaired is None else _repaired_json(repaired, listed))
        else:
            if repaired is not None:
                _print_repairs(repaired)
            _print_findings(findings, fix or model)
        if findings:
            raise typer.Exit(1)


def _print_findings(findings: list[Finding], path: Path) -> None:
    for finding in findings:
        typer.echo(f"{finding.id} {finding.severity} {finding.node}: {finding.reason} [{finding.rule}]")
        typer.echo(f"     {finding.remedy}")
    typer.echo(f"{path}: {counted(len(findings), 'finding') if findings else 'no findings'}")


def _print_repairs(repaired: Repaired) -> None:
    from trtdeploy.onnxgraph.lint import RULES

    for repair in repaired.repairs:
        typer.echo(f"{RULES[repair.rule].id} repaired {repair.node}: {repair.what} [{repair.rule}]")
    done, found = counted(len(repaired.repairs), "repair"), counted(len(repaired.before), "finding")
    typer.echo(f"{done}; {found} before, {len(repaired.left)} left")
    if isinstance(repaired.difference, str):
        typer.echo(f"answers not compared: {repaired.difference}")
        return
    for name, largest in repaired.difference.largest.items():
        before, ratio = repaired.difference.largest_before[name], repaired.difference.sqnr_db[name]
        typer.echo(
            f"answers on random inputs (seed {repaired.difference.seed}): {name!r} differs by at most {largest:.4g}, "
            f"where the largest was {before:.4g}" + (f"; {ratio:.1f} dB" if ratio is not None else "")
        )


def _repaired_json(repaired: Repaired, findings: list[dict[str, Any]]) -> dict[str, Any]:
    difference = repaired.difference
    return {
        "before": len(repaired.before),
        "repairs": [asdict(repair) for repair in repaired.repairs],
        "findings": findings,
        "difference": {"not_compared": difference} if isinstance(difference, str) else asdict(difference),
    }
