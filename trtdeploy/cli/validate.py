"""``trtdeploy validate``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from trtdeploy.cli.console import Bars, door, finite_seconds, print_json
from trtdeploy.errors import GateError, UsageError

if TYPE_CHECKING:
    from trtdeploy.datasets import Dataset
    from trtdeploy.ledger import Ledger
    from trtdeploy.plan import Manifest
    from trtdeploy.preprocessing import Preprocessing
    from trtdeploy.validation import Examination, Target, ValidationReport

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(validate)


def validate(
    data: Annotated[
        str, typer.Option("--data", help="digits, or a folder or archive of <split>/<class>/*.jpg or *.png.")
    ],
    url: Annotated[
        str | None, typer.Option("--url", help="grpc://HOST:PORT or http://HOST:PORT of a Triton server.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Model name on the server.")] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", dir_okay=False, help="Validate a plan here, without a server.")
    ] = None,
    version: Annotated[str, typer.Option("--version", help="Version [default: the server's choice].")] = "",
    reference: Annotated[
        Path | None,
        typer.Option("--reference", dir_okay=False, help="ONNX file to run here on the same inputs and compare with."),
    ] = None,
    preprocessing: Annotated[
        Path | None,
        typer.Option("--preprocessing", dir_okay=False, help="JSON specification [default: what the model carries]."),
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(
            "--ledger", dir_okay=False, help="Record the stage here; its float stage is the baseline of the drop."
        ),
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", help="Largest allowed drop of top-1, in percentage points.")
    ] = None,
    prove_drop: Annotated[
        bool, typer.Option("--prove-drop", help="The whole 95% interval of the drop must lie inside --max-drop.")
    ] = False,
    min_agreement: Annotated[
        float | None, typer.Option("--min-agreement", help="Smallest allowed agreement with the reference, in percent.")
    ] = None,
    max_variation: Annotated[
        float | None,
        typer.Option(
            "--max-variation",
            help="Largest allowed change of a sample's scores with its place in a batch, in percent of their spread.",
        ),
    ] = None,
    compare_version: Annotated[
        list[str] | None,
        typer.Option("--compare-version", help="Ask this version for the same samples too; may be repeated."),
    ] = None,
    min_version_agreement: Annotated[
        float | None,
        typer.Option("--min-version-agreement", help="Smallest allowed agreement with each of those, in percent."),
    ] = None,
    max_instance_difference: Annotated[
        float | None,
        typer.Option(
            "--max-instance-difference",
            help="Largest allowed difference of scores between instances that answer one request, in percent of their "
            "spread; 0 asks for the same bits.",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", dir_okay=False, help="Write OUT.html, and the same as OUT.json.")
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option("--manifest", dir_okay=False, help="Manifest of the served plan (PLAN.json), for the report."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Samples per request.")] = 1,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests in flight.")] = 4,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.001, callback=finite_seconds, help="Seconds that one request may take.")
    ] = 30.0,
    retries: Annotated[
        int, typer.Option("--retries", min=0, max=20, help="Times to ask again where the server is unavailable.")
    ] = 0,
    split_seed: Annotated[int, typer.Option("--split-seed", min=0, help="Of splits that are drawn.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check accuracy, agreement and latency of what is served; exit code 1 if a gate does not hold."""
    with door(), Bars() as bars:
        from trtdeploy.datasets import open_dataset
        from trtdeploy.engine import Engine
        from trtdeploy.ledger import Ledger
        from trtdeploy.report.page import check_path
        from trtdeploy.triton.client import connect
        from trtdeploy.triton.served import ServedTarget
        from trtdeploy.validation import PlanTarget, ValidationOptions, examine

        options = ValidationOptions(
            preprocessing=_read_preprocessing(preprocessing) if preprocessing else None,
            reference=reference,
            max_drop=max_drop,
            prove_drop=prove_drop,
            min_agreement=min_agreement,
            max_variation=max_variation,
            max_instance_difference=max_instance_difference,
            min_version_agreement=min_version_agreement,
            batch_size=batch_size,
            concurrency=concurrency,
        )
        if report is not None:
            check_path(report, ledger=ledger)
        facts = _read_manifest(manifest) if manifest is not None else None
        recorded = Ledger(ledger) if ledger is not None else None
        with ExitStack() as stack:
            target: Target
            others: list[Target] = []
            if url is not None and model is not None and plan is None:
                client = stack.enter_context(connect(url, timeout_s=timeout, retries=retries))
                target = ServedTarget(client, model, version)
                others += [ServedTarget(client, model, other) for other in compare_version or ()]
            elif compare_version:
                raise UsageError("--compare-version asks a server; it needs --url and --model.")
            elif plan is not None and url is None and model is None:
                engine = stack.enter_context(Engine.load(plan, contexts=concurrency, timeout_s=timeout))
                target = PlanTarget(engine, plan)
                facts = facts or engine.manifest
            else:
                raise UsageError("Give --url and --model to validate a server, or --plan to validate a plan here.")
            dataset = stack.enter_context(open_dataset(data, split_seed=split_seed))
            examination = examine(
                target,
                dataset,
                options,
                ledger=recorded,
                others=others,
                progress=bars.labelled("validating"),
            )
            if report is not None:
                _write_report(report, target, dataset, examination, recorded, facts)
        outcome = examination.report
        bars.finish()
        if as_json:
            print_json({**outcome.model_dump(mode="json"), "passed": outcome.passed})
        else:
            typer.echo(_as_text(outcome))
        if not outcome.passed:
            raise typer.Exit(GateError.exit_code)


def _write_report(
    path: Path,
    target: Target,
    dataset: Dataset,
    examination: Examination,
    ledger: Ledger | None,
    manifest: Manifest | None,
) -> None:
    from trtdeploy.report import compose, write_report

    write_report(compose(target, dataset, examination, ledger=ledger, manifest=manifest), path)


def _read_manifest(path: Path) -> Manifest:
    from trtdeploy.plan import Manifest

    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UsageError(f"{path} is no manifest of a plan: {error}") from error


def _read_preprocessing(path: Path) -> Preprocessing:
    from trtdeploy.preprocessing import Preprocessing

    try:
        return Preprocessing.from_json(path.read_text())
    except (UnicodeDecodeError, UsageError) as error:
        raise UsageError(f"{path} is no preprocessing specification: {error}") from error


def _as_text(report: ValidationReport) -> str:
    lines = [
        f"{report.name}{' version ' + report.version if report.version else ''}: {report.n} samples, "
        f"{report.throughput_per_s:.1f} per second with {report.concurrency} requests of {report.batch_size} in flight",
        f"top-1       {report.top1.format()} %",
    ]
    if report.answered_by:
        shares = (f"version {version}: {count}" for version, count in sorted(report.answered_by.items()))
        lines.append(f"answered by {', '.join(shares)}")
    if report.drop is not None and report.baseline is not None:
        lines.append(
            f"drop        {report.drop:+.2f} points from {report.baseline['top1']:.2f} ({report.baseline['name']})"
        )
    if report.agreement is not None:
        lines.append(f"agreement   {report.agreement:.2f} % with {report.reference}")
    lines.append(
        "latency     " + ", ".join(f"{name} {value.value:.2f} ms" for name, value in report.latency_ms.items())
    )
    if report.variation_by_cause is not None:
        parts = (f"{cause} {percent:.3g} %" for cause, percent in report.variation_by_cause.items())
        lines.append(f"variation   {', '.join(parts)} of the scores' spread")
    if report.instances is not None:
        found = report.instances
        lines.append(
            f"instances   {found.differing} of {found.requests} answers of {found.instances} instances to one request "
            f"of {found.batch_size} differ, by up to {found.largest:.3g} % of the scores' spread"
        )
    for other in report.versions:
        accuracy = other.difference.difference.format()
        text = f"version {other.version:3} agreement {other.agreement:.2f} %, accuracy {accuracy} points against it"
        if other.largest is not None:
            text += f", scores differ by up to {other.largest:.3g} % of their spread ({other.largest_at})"
        lines.append(text)
    for gate in report.gates:
        verdict = "passed" if gate.passed else "FAILED"
        lines.append(f"{verdict}      {gate.name} {gate.value:.2f}, limit {gate.limit:g}")
    return "\n".join(lines)
