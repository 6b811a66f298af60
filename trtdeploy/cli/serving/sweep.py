"""``trtdeploy load --sweep``: a command of its own behind the same name."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from trtdeploy.cli.console import Bars, Output, door, interrupt, print_json
from trtdeploy.cli.options.groups import with_option_groups
from trtdeploy.cli.options.measurement import SweepMeasurementFlags
from trtdeploy.errors import GateError

if TYPE_CHECKING:
    from trtdeploy.load.sweep.choice import SweepPoint
    from trtdeploy.load.sweep.results import SweepResults
    from trtdeploy.load.sweep.sweep import Sweep

_FLAG = "--sweep"
_DERIVED = "auto"
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


class LoadCommand(TyperCommand):
    """``load``; with ``--sweep`` the command of this file, which has other options."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse the arguments of the one command or of the other."""
        if not any(argument.partition("=")[0] == _FLAG for argument in args):
            return super().make_context(info_name, args, parent, **extra)
        commands = typer.Typer(
            add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=self.rich_markup_mode
        )
        commands.command()(with_option_groups(sweep))
        return typer.main.get_command(commands).make_context(info_name, _with_space(args), parent, **extra)


def _with_space(args: list[str]) -> list[str]:
    """Give ``--sweep`` alone a value: the option parser knows no optional ones."""
    complete: list[str] = []
    for index, argument in enumerate(args):
        following = args[index + 1] if index + 1 < len(args) else "-"
        complete.append(f"{_FLAG}={_DERIVED}" if argument == _FLAG and following.startswith("-") else argument)
    return complete


def sweep(
    space: Annotated[
        str,
        typer.Option(
            _FLAG,
            metavar="[SPACE.yaml]",
            help="Lists to combine: instances, max_batch_size, preferred_batch_sizes, max_queue_delay_us, concurrency "
            "(default: derived from the plan's profiles and the machine).",
        ),
    ],
    repository: Annotated[
        Path, typer.Option("--repository", help="The model repository. Copies of the model are served.")
    ],
    model: Annotated[str, typer.Option("--model", help="The model's name in it.")],
    measurement: SweepMeasurementFlags,
    apply: Annotated[
        bool,
        typer.Option(
            "--apply",
            help="Write the config of the stable point with the highest throughput among those that keep --slo-p99-ms, "
            "once a longer measurement beside what is deployed has confirmed it.",
        ),
    ] = False,
    slo_p99_ms: Annotated[
        float | None, typer.Option("--slo-p99-ms", min=0.001, help="Largest p99 of the choice, in milliseconds.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option("--results", dir_okay=False, help="JSON lines, one per load (default: MODEL.sweep.jsonl)."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a results file that is there.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", dir_okay=False, help="Draw throughput against p99: .png or .svg.")
    ] = None,
    tritonserver: Annotated[
        Path | None, typer.Option("--tritonserver", help="The server's executable (default: found).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve copies of a packaged model in many ways, measure each under several loads, and choose.

    The repository is not touched without --apply. Exit code 1 if there is no point to choose: none is stable, none
    keeps --slo-p99-ms, or a longer measurement confirms none.
    """
    signal.signal(signal.SIGTERM, interrupt)  # copies and servers have to go
    with door(), Bars() as bars:
        from trtdeploy.load.sweep.pareto_chart import check_chart, draw_pareto
        from trtdeploy.load.sweep.retune import deployed_model
        from trtdeploy.load.sweep.sweep import Sweep
        from trtdeploy.triton.server.installation import find_tritonserver

        if plot is not None:
            check_chart(plot)
        with deployed_model(repository, model) as deployed:

            def say(text: str) -> None:
                bars.finish()
                typer.echo(text, err=True)

            run = Sweep(
                deployed,
                find_tritonserver(tritonserver),
                measurement.windows(),
                data=measurement.data,
                batch_size=measurement.batch_size,
                seed=measurement.seed,
                timeout_s=measurement.timeout,
                show=bars.show,
                say=say,
            )
            found = _measure(run, space, results or Path(f"{model}.sweep.jsonl"), resume)
            if plot is not None:
                title = f"{model}, version {deployed.version}: {len(found.points)} loads"
                draw_pareto(plot, found.points, title=title, deployed=run.as_deployed, slo_p99_ms=slo_p99_ms)
            facts = _facts(run, found)
            if not as_json:
                bars.finish()
                _show(run, found)
            try:
                facts |= _choose(run, found, slo_p99_ms, apply, as_json)
            except GateError:
                bars.finish()
                if as_json:
                    print_json({**facts, "choice": None, "confirmed": None, "applied": None})
                raise
        bars.finish()
        if as_json:
            print_json(facts)


def _measure(run: Sweep, space: str, path: Path, resume: bool) -> SweepResults:
    from trtdeploy.load.sweep.results import SweepResults
    from trtdeploy.load.sweep.space import default_space, read_space
    from trtdeploy.runtimes.onnxruntime.cpu import usable_cores

    derived = default_space(run.deployed.manifest, run.deployed.options, cores=usable_cores())
    declared = derived if space == _DERIVED else read_space(space, derived)
    results = SweepResults(path, run.head(declared), resume=resume)
    left = run.missing(declared, results)
    least_s, most_s = run.load_seconds(left)
    if left:
        run.say(
            f"{len(left)} candidates, {sum(map(len, left.values()))} loads: {least_s / 60:.1f} to {most_s / 60:.1f} "
            f"minutes, and {len(left)} starts of a server. Results go to {path}; what is there when you stop is kept "
            "for --resume."
        )
    run.run(declared, results)
    return results


def _choose(run: Sweep, found: SweepResults, slo_p99_ms: float | None, apply: bool, as_json: bool) -> dict[str, Any]:
    """Choose by the rule and say so; with ``apply``, confirm the choice first and write it."""
    from trtdeploy.load.sweep.choice import ranked
    from trtdeploy.load.sweep.retune import retune

    promise = f" with p99 <= {slo_p99_ms:g} ms" if slo_p99_ms is not None else ""
    if not apply:
        best = ranked(found.points, slo_p99_ms)[0]
        if not as_json:
            typer.echo(f"highest throughput{promise}: {_named(best)}. Write it with --resume --apply.")
        return {"choice": best.model_dump(mode="json"), "confirmed": None, "applied": None}
    choice = run.choose(found.points, slo_p99_ms)
    candidate = choice.point.candidate
    before, after = retune(run.deployed, candidate.applied_to(run.deployed.options))
    if not as_json:
        typer.echo(f"highest throughput{promise}: {_named(choice.point)}")
        typer.echo(f"in a longer measurement: {_figures(choice.confirmed)}")
        if choice.deployed is not None:
            typer.echo(f"beside it, as deployed: {_named(choice.deployed)}")
        config = run.deployed.folder / "config.pbtxt"
        if before == after:
            typer.echo(f"{config}: nothing to change")
        else:
            typer.echo(f"{config}: {run.as_deployed} -> {candidate}")
            typer.echo("A running server takes it at its next load of the model.")
    return {
        "choice": choice.point.model_dump(mode="json"),
        "confirmed": choice.confirmed.model_dump(mode="json"),
        "applied": {
            "before": run.as_deployed.model_dump(mode="json"),
            "after": candidate.model_dump(mode="json"),
            "changed": before != after,
            "as_deployed": choice.deployed.model_dump(mode="json") if choice.deployed is not None else None,
        },
    }


def _show(run: Sweep, found: SweepResults) -> None:
    from rich.table import Table

    from trtdeploy.load.sweep.choice import pareto

    front = {id(entry) for entry in pareto(found.points)}
    table = Table(box=None, pad_edge=False, header_style="")
    for title in ("candidate", "concurrency", "samples/s", "p50 ms", "p99 ms", ""):
        table.add_column(title, justify="left" if title in ("candidate", "") else "right")
    for entry in found.points:
        notes = [
            "Pareto" if id(entry) in front else "",
            "as deployed" if entry.candidate == run.as_deployed else "",
            "" if entry.point.stable else "NOT STABLE",
            f"{entry.point.refused} REFUSED" if entry.point.refused else "",
        ]
        p50_ms = entry.point.latency_ms["p50"].value
        table.add_row(
            str(entry.candidate),
            str(entry.concurrency),
            f"{entry.samples_per_s:.1f}",
            f"{p50_ms:.2f}",
            f"{entry.p99_ms:.2f}",
            ", ".join(filter(None, notes)),
        )
    Output().print(table)
    reasons: dict[str, list[str]] = {}
    for refused in found.refused:
        reasons.setdefault(refused.reason, []).append(str(refused.candidate))
    for reason, candidates in reasons.items():
        typer.echo(f"not measured: {'; '.join(candidates)}\n  {reason}")
    unstable = sum(not entry.point.stable for entry in found.points)
    if unstable:
        typer.echo(f"{unstable} of {len(found.points)} loads were not stable: none of these is chosen.")
    full = sum(entry.point.refused > 0 for entry in found.points)
    if full:
        typer.echo(f"{full} of {len(found.points)} loads filled the model's queue: none of these is chosen.")


def _facts(run: Sweep, found: SweepResults) -> dict[str, Any]:
    from trtdeploy.load.sweep.choice import pareto

    front = {id(entry) for entry in pareto(found.points)}
    return {
        "model": run.deployed.folder.name,
        "version": run.deployed.version,
        "results": str(found.path),
        "as_deployed": run.as_deployed.model_dump(mode="json"),
        "points": [{**entry.model_dump(mode="json"), "pareto": id(entry) in front} for entry in found.points],
        "refused": [entry.model_dump(mode="json") for entry in found.refused],
    }


def _named(entry: SweepPoint) -> str:
    return f"{entry.candidate}, concurrency {entry.concurrency}: {_figures(entry)}"


def _figures(entry: SweepPoint) -> str:
    return f"{entry.samples_per_s:.1f} samples/s, p99 {entry.p99_ms:.2f} ms"
