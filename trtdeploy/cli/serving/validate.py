"""``trtdeploy validate``."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from trtdeploy.cli.console import Bars, door, interrupt, print_json
from trtdeploy.cli.options.connection import ConnectionFlags, TransportFlags, connected
from trtdeploy.cli.options.groups import with_option_groups
from trtdeploy.cli.options.validation import GateFlags, RecordFlags, RequestFlags, TargetFlags
from trtdeploy.errors import GateError, UsageError, invalid_fields

if TYPE_CHECKING:
    from trtdeploy.data import Dataset
    from trtdeploy.data.preprocessing import Preprocessing
    from trtdeploy.ledger import Ledger
    from trtdeploy.plan import Manifest
    from trtdeploy.triton.client import InferenceClient, LoopedClient, ServedModel
    from trtdeploy.triton.targets.served_classifier import ServedTarget
    from trtdeploy.validation import Examination, Target, ValidationReport

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(with_option_groups(validate))


def validate(
    data: Annotated[
        str, typer.Option("--data", help="digits, or a folder or archive of <split>/<class>/*.jpg or *.png.")
    ],
    what: TargetFlags,
    gates: GateFlags,
    records: RecordFlags,
    requests: RequestFlags,
    connection: ConnectionFlags,
    transport: TransportFlags,
    split_seed: Annotated[int, typer.Option("--split-seed", min=0, help="Of splits that are drawn.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check accuracy, agreement and latency of what is served; exit code 1 if a gate does not hold."""
    signal.signal(signal.SIGTERM, interrupt)  # what the server was told of has to be taken back
    with door(), Bars() as bars:
        from trtdeploy.data import open_dataset
        from trtdeploy.ledger import Ledger
        from trtdeploy.report.page import check_path
        from trtdeploy.validation import ValidationOptions, examine

        options = ValidationOptions(
            preprocessing=_read_preprocessing(what.preprocessing) if what.preprocessing else None,
            reference=what.reference,
            batch_size=requests.batch_size,
            concurrency=requests.concurrency,
            **asdict(gates),
        )
        if records.report is not None:
            check_path(records.report, ledger=records.ledger)
        facts = _read_manifest(records.manifest) if records.manifest is not None else None
        recorded = Ledger(records.ledger) if records.ledger is not None else None
        with ExitStack() as stack:
            target: Target
            others: Sequence[Target] = ()
            if what.url is not None and what.model is not None and what.plan is None:
                client = _client(what.url, requests, connection, transport)
                stack.callback(client.close)
                served, *others = _served(client, what.model, what)
                if facts is not None and records.manifest is not None:
                    _check_served_plan(facts, records.manifest, client, served.model)
                target = served
            elif what.compare_version:
                raise UsageError("--compare-version asks a server; it needs --url and --model.")
            elif what.plan is not None and what.url is None and what.model is None:
                if connection.given or transport != TransportFlags() or requests.asynchronous or requests.retries:
                    raise UsageError("--plan asks nobody over a connection: leave out the options of one.")
                if what.version:
                    raise UsageError(
                        f"--version {what.version} is a version on a server; --plan has none.", hint="Leave it out."
                    )
                target, own = _local(stack, what.plan, requests)
                if facts is not None and facts.plan_sha256 != own.plan_sha256:
                    raise UsageError(f"{records.manifest} is not the manifest of {what.plan}.")
                facts = own
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
            if records.report is not None:
                _write_report(records.report, target, dataset, examination, recorded, facts)
        outcome = examination.report
        bars.finish()
        if as_json:
            print_json({**outcome.model_dump(mode="json"), "passed": outcome.passed})
        else:
            typer.echo(_as_text(outcome))
        if not outcome.passed:
            raise typer.Exit(GateError.exit_code)


def _client(
    url: str, requests: RequestFlags, connection: ConnectionFlags, transport: TransportFlags
) -> InferenceClient | LoopedClient:
    """Return the client that the options describe; nothing is sent yet."""
    from trtdeploy.triton.client import LoopedClient, connect_async

    if not requests.asynchronous:
        return connected(url, connection, transport, timeout_s=requests.timeout, retries=requests.retries)
    for flag, given in (("--stream", transport.stream), ("--shared-memory", transport.shared_memory)):
        if given:
            raise UsageError(f"--asyncio and {flag} are two ways to send requests.", hint="Give one of them.")
    return LoopedClient(
        connect_async(
            url,
            timeout_s=requests.timeout,
            retries=requests.retries,
            deadline_s=transport.deadline_s,
            options=connection.options(),
        )
    )


def _served(client: InferenceClient | LoopedClient, model: str, what: TargetFlags) -> list[ServedTarget]:
    """Return the target on a server, and after it the other versions to compare it with."""
    from trtdeploy.triton.targets.image_pipeline import served_target

    return [served_target(client, model, version) for version in (what.version, *(what.compare_version or ()))]


def _check_served_plan(
    manifest: Manifest, path: Path, client: InferenceClient | LoopedClient, model: ServedModel
) -> None:
    from trtdeploy.triton.targets.plan_identity import check_served_plan

    steps = [client.describe(step) for step in model.steps]
    check_served_plan(manifest, path.name, steps or [model])


def _local(stack: ExitStack, plan: Path, requests: RequestFlags) -> tuple[Target, Manifest]:
    """Return the target of a plan in this process, and its manifest."""
    from trtdeploy.engine import Engine
    from trtdeploy.validation import PlanTarget

    engine = stack.enter_context(Engine.load(plan, contexts=requests.concurrency, timeout_s=requests.timeout))
    return PlanTarget(engine, plan), engine.manifest


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
        return Manifest.read(path.read_bytes(), path)
    except ValidationError as error:
        raise UsageError(f"{path} is no manifest of a plan: {invalid_fields(error)}.") from error


def _read_preprocessing(path: Path) -> Preprocessing:
    from trtdeploy.data.preprocessing import Preprocessing

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
    if report.top_k is not None:
        top = report.top_k
        text = f"top-{top.k:<7} {top.accuracy.format()} %"
        if top.same_classes is not None:
            text += f"; {top.same_classes:.2f} % name the classes of {report.reference}, "
            text += f"probabilities differ by up to {top.largest_difference:.3g} points"
        lines.append(text)
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
