"""The options of ``trtdeploy validate``, in groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from trtdeploy.cli.console import finite_seconds
from trtdeploy.cli.options.connection import SERVER_URL_HELP

_TARGET, _GATES, _RECORDS, _REQUESTS = "What is validated", "Gates", "Records", "Requests"


@dataclass(frozen=True)
class TargetFlags:
    """Who is asked, and what the answers are held against."""

    url: Annotated[str | None, typer.Option("--url", help=SERVER_URL_HELP, rich_help_panel=_TARGET)] = None
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Model name on the server. A pipeline that takes image files is sent the dataset's files.",
            rich_help_panel=_TARGET,
        ),
    ] = None
    version: Annotated[
        str, typer.Option("--version", help="Version (default: the server's choice).", rich_help_panel=_TARGET)
    ] = ""
    plan: Annotated[
        Path | None,
        typer.Option("--plan", dir_okay=False, help="Validate a plan here, without a server.", rich_help_panel=_TARGET),
    ] = None
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            dir_okay=False,
            help="ONNX file or plan to run here on the same samples and compare with.",
            rich_help_panel=_TARGET,
        ),
    ] = None
    preprocessing: Annotated[
        Path | None,
        typer.Option(
            "--preprocessing",
            dir_okay=False,
            help="JSON specification (default: what the model carries).",
            rich_help_panel=_TARGET,
        ),
    ] = None
    compare_version: Annotated[
        list[str] | None,
        typer.Option(
            "--compare-version",
            help="Ask this version for the same samples too; may be repeated.",
            rich_help_panel=_TARGET,
        ),
    ] = None


@dataclass(frozen=True)
class GateFlags:
    """What must hold."""

    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", help="Largest allowed drop of top-1, in percentage points.", rich_help_panel=_GATES),
    ] = None
    prove_drop: Annotated[
        bool,
        typer.Option(
            "--prove-drop",
            help="The whole 95% interval of the drop must lie inside --max-drop.",
            rich_help_panel=_GATES,
        ),
    ] = False
    min_agreement: Annotated[
        float | None,
        typer.Option(
            "--min-agreement",
            help="Smallest allowed agreement with the reference, in percent.",
            rich_help_panel=_GATES,
        ),
    ] = None
    max_variation: Annotated[
        float | None,
        typer.Option(
            "--max-variation",
            help="Largest allowed change of a sample's scores with its place in a batch, in percent of their spread.",
            rich_help_panel=_GATES,
        ),
    ] = None
    min_version_agreement: Annotated[
        float | None,
        typer.Option(
            "--min-version-agreement",
            help="Smallest allowed agreement with each --compare-version, in percent.",
            rich_help_panel=_GATES,
        ),
    ] = None
    max_instance_difference: Annotated[
        float | None,
        typer.Option(
            "--max-instance-difference",
            help="Largest allowed difference of scores between instances that answer one request, in percent of their "
            "spread; 0 asks for the same bits.",
            rich_help_panel=_GATES,
        ),
    ] = None


@dataclass(frozen=True)
class RecordFlags:
    """What is written."""

    ledger: Annotated[
        Path | None,
        typer.Option(
            "--ledger",
            dir_okay=False,
            help="Record the stage here; its float stage is the baseline of the drop.",
            rich_help_panel=_RECORDS,
        ),
    ] = None
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", dir_okay=False, help="Write OUT.html, and the same as OUT.json.", rich_help_panel=_RECORDS
        ),
    ] = None
    manifest: Annotated[
        Path | None,
        typer.Option(
            "--manifest",
            dir_okay=False,
            help="Manifest of the served plan (PLAN.json): held against what is served, and shown in the report.",
            rich_help_panel=_RECORDS,
        ),
    ] = None


@dataclass(frozen=True)
class RequestFlags:
    """How hard is asked."""

    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Samples per request.", rich_help_panel=_REQUESTS)
    ] = 1
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, help="Requests in flight.", rich_help_panel=_REQUESTS)
    ] = 4
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            min=0.001,
            callback=finite_seconds,
            help="Seconds that one request may take.",
            rich_help_panel=_REQUESTS,
        ),
    ] = 30.0
    retries: Annotated[
        int,
        typer.Option(
            "--retries",
            min=0,
            max=20,
            help="Times to ask again where the server is unavailable or the queue is full.",
            rich_help_panel=_REQUESTS,
        ),
    ] = 0
    asynchronous: Annotated[
        bool,
        typer.Option("--asyncio", help="Send requests from the tasks of one event loop.", rich_help_panel=_REQUESTS),
    ] = False
