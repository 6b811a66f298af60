"""``trtdeploy ledger show`` and ``trtdeploy ledger diff``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from trtdeploy.cli.console import Output, door, print_json
from trtdeploy.cli.plans import AsJson

if TYPE_CHECKING:
    from trtdeploy.ledger import Stage
    from trtdeploy.statistics import PairedDifference

LedgerPath = Annotated[Path, typer.Argument(dir_okay=False, help="A ledger.json.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    ledger = typer.Typer(no_args_is_help=True, help="Look at accuracy ledgers, and find the stage that lost accuracy.")
    ledger.command()(show)
    ledger.command()(diff)
    app.add_typer(ledger, name="ledger")


def show(ledger: LedgerPath, as_json: AsJson = False) -> None:
    """Show every stage: accuracy, agreement, divergence from float, and paired differences in percentage points."""
    with door():
        from trtdeploy.ledger import Ledger

        stages = Ledger(ledger).stages
        if as_json:
            print_json({stage: record.model_dump(mode="json") for stage, record in stages.items()})
            return
        table = Table(
            "stage", "n", "top-1 %", "top-5 %", "agrees %", "KL mean", "KL p99", "to previous", "to float", box=None
        )
        for stage, record in stages.items():
            divergence = record.kl_from_float
            table.add_row(
                stage,
                str(record.n),
                record.top1.format(),
                "-" if record.top5 is None else f"{record.top5.value:.2f}",
                "-" if record.agreement is None else f"{record.agreement:.2f}",
                "-" if divergence is None else f"{divergence.mean:.2g}",
                "-" if divergence is None else f"{divergence.p99:.2g}",
                _difference(record.against_previous),
                _difference(record.against_float),
            )
        Output().print(table)
        for stage, record in stages.items():
            if record.answered_by:
                shares = (f"version {version}: {count}" for version, count in sorted(record.answered_by.items()))
                typer.echo(f"{stage} was answered by {', '.join(shares)}")


def diff(
    ledger: LedgerPath,
    other: Annotated[
        Path | None, typer.Argument(dir_okay=False, help="A second ledger, which is judged against the first.")
    ] = None,
    start: Annotated[str | None, typer.Option("--from", help="Compare this stage only, with --to.")] = None,
    end: Annotated[str | None, typer.Option("--to", help="The stage that is judged.")] = None,
    threshold: Annotated[
        float, typer.Option("--threshold", min=0, help="Do not name losses up to so many percentage points.")
    ] = 0.0,
    limit: Annotated[int, typer.Option("--limit", min=0, help="How many flipped samples to list.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Name the stage that lost the accuracy: the first whose paired loss is shown, and the samples that flipped.

    Each stage is compared with the one before it. With a second ledger, each stage with the same one there; --to then
    picks one stage.
    """
    with door():
        from trtdeploy.errors import UsageError
        from trtdeploy.ledger import Ledger
        from trtdeploy.ledger.diff import diff_ledgers, diff_stages

        if other is None:
            found = diff_stages(Ledger(ledger), start=_stage(start), end=_stage(end), threshold=threshold, limit=limit)
        elif start is not None:
            raise UsageError("--from does not go with two ledgers; each stage is compared with itself there.")
        else:
            found = diff_ledgers(Ledger(ledger), Ledger(other), stage=_stage(end), threshold=threshold, limit=limit)
        if as_json:
            print_json({"verdict": found.verdict, **found.model_dump(mode="json")})
            return
        typer.echo(found.verdict)
        table = Table("stage", "against", "difference", "lost", "gained", "McNemar p", "flips", box=None)
        for item in found.comparisons:
            change = item.difference
            table.add_row(
                item.stage,
                item.reference,
                change.difference.format(),
                str(change.lost),
                str(change.gained),
                f"{change.mcnemar_p:.2g}",
                str(item.flips),
            )
        output = Output()
        output.print(table)
        blamed = next((item for item in found.comparisons if item.loss_shown), None)
        if blamed is None and len(found.comparisons) == 1:
            blamed = found.comparisons[0]
        if blamed is not None and blamed.flipped:
            samples = Table("sample", "label", blamed.reference, blamed.stage, box=None)
            for flip in blamed.flipped:
                samples.add_row(flip.id, str(flip.label), str(flip.reference), str(flip.answer))
            output.print(samples)
            if blamed.flips > len(blamed.flipped):
                typer.echo(f"... and {blamed.flips - len(blamed.flipped)} more; see --limit.")


def _stage(name: str | None) -> Stage | None:
    from trtdeploy.errors import UsageError
    from trtdeploy.ledger import STAGES

    if name is None:
        return None
    for stage in STAGES:
        if stage == name:
            return stage
    raise UsageError(f"{name!r} is no stage; the stages are {', '.join(STAGES)}.")


def _difference(change: PairedDifference | None) -> str:
    return "-" if change is None else change.difference.format()
