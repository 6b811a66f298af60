"""``trtdeploy doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trtdeploy.cli.console import Output, door, print_json
from trtdeploy.errors import GateError

if TYPE_CHECKING:
    from trtdeploy.doctor.judgement import Ability
    from trtdeploy.doctor.machine import Driver, Library, Machine, Server
    from trtdeploy.doctor.report import Report

_COLOURS = {"ok": "green", "yes": "green", "broken": "red", "no": "red", "missing": "yellow", "none": "yellow"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(doctor)


def doctor(
    plans: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PLAN", dir_okay=False, help="Also say what these plans need."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Show what this machine has and which commands will therefore work; exit code 1 if something does not fit."""
    with door():
        from trtdeploy.doctor.examination import examine
        from trtdeploy.doctor.report import diagnose
        from trtdeploy.plan import read_manifest

        for plan in plans or []:
            read_manifest(plan)  # before the examination, which takes seconds
        with Console(stderr=True).status("looking"):
            machine = examine()
        report = diagnose(machine, plans or [])
        if as_json:
            print_json({**report.model_dump(mode="json"), "healthy": report.healthy})
        else:
            print_report(report, Output(markup=True))
        if not report.healthy:
            raise typer.Exit(GateError.exit_code)


def print_report(report: Report, console: Console) -> None:
    """Print a report for people."""
    machine = report.machine
    console.print(f"[bold]trtdeploy {machine.trtdeploy}[/bold] on Python {machine.python}, {machine.platform}")
    _print_found(console, machine, report.runtimes)
    _print_commands(console, report)
    for plan in report.plans:
        console.print(f"\n[bold]Plan[/bold] {escape(plan.file)}")
        rows = [("needs", plan.needs), ("runs here", "yes" if plan.runs_here else f"no: {plan.obstacle}")]
        rows += [("to mend it", plan.mend)] if plan.mend else []
        rows += [("precision", plan.precision)] if plan.precision else []
        _print_rows(console, [*rows, ("Triton", plan.triton)])
    if report.healthy:
        console.print("\n[green]No problem was found.[/green]")
    elif not report.problems:
        console.print("\n[red]Nothing is broken, but not every plan above runs here.[/red]")
    for number, problem in enumerate(report.problems, 1):
        console.print(f"\n[red]PROBLEM {number}[/red]  {escape(problem.what)}")
        console.print(f"  to mend it: [bold]{escape(problem.mend)}[/bold]", soft_wrap=True)


def _print_found(console: Console, machine: Machine, able: dict[str, Ability]) -> None:
    table = Table("found", "", "version", "", box=None, pad_edge=False)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    table.columns[2].min_width = 9
    table.columns[2].overflow = table.columns[3].overflow = "fold"
    driver = machine.driver
    table.add_row("driver", _word(_driver_state(driver)), *_about_driver(driver))
    for gpu in driver.gpus:
        memory = f"{gpu.memory_bytes / 2**30:.0f} GiB"
        table.add_row("GPU", _word("ok"), gpu.capability, escape(f"{gpu.name}, {memory}"))
    for name, library in machine.libraries.items():
        ability = able.get(name)
        note = _ability(ability) if ability and library.state == "ok" else ""
        table.add_row(name, _word(library.state), library.version or "", escape(_about(library, note)))
    table.add_row("tritonserver", _word("ok" if machine.server.path else "missing"), *_about_server(machine.server))
    cache = machine.cache
    table.add_row("cache folder", _word("ok" if cache.writable else "broken"), "", escape(cache.path))
    console.print()
    console.print(table)


def _print_commands(console: Console, report: Report) -> None:
    table = Table("command", "works", "", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    table.columns[2].overflow = "fold"
    for name, command in report.commands.items():
        table.add_row(name, _word("yes" if command.works else "no"), escape(command.note))
    console.print()
    console.print(table)


def _print_rows(console: Console, rows: list[tuple[str, str]]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(f"  {name}", escape(value))
    console.print(table)


def _word(word: str) -> str:
    return f"[{_COLOURS[word]}]{word}[/{_COLOURS[word]}]"


def _ability(ability: Ability) -> str:
    if ability.build and ability.run:
        return "builds and runs plans"
    parts = ["builds plans" if ability.build else f"cannot build: {ability.why_not_build}"]
    if ability.why_not_run != ability.why_not_build:
        parts.append(f"cannot run them: {ability.why_not_run}")
    return "; ".join(parts)


def _about(library: Library, note: str) -> str:
    built_for = f"for CUDA {library.cuda}" if library.cuda else ""
    wrong = library.detail if library.state == "broken" else ""
    return "; ".join(filter(None, [built_for, note, wrong]))


def _driver_state(driver: Driver) -> str:
    if driver.failure:
        return "broken"
    return "ok" if driver.version or driver.cuda else "none"


def _about_driver(driver: Driver) -> tuple[str, str]:
    cuda = f"supports CUDA {driver.cuda}" if driver.cuda else ""
    seen = f"seen by {driver.found_by}" if driver.found_by != "none" else ""
    return driver.version or "", escape("; ".join(filter(None, [cuda, seen, driver.failure or driver.detail])))


def _about_server(server: Server) -> tuple[str, str]:
    if server.path is None:
        return "", escape(server.detail)
    backends = f"backends: {', '.join(server.backends) or 'none'}"
    without = "" if "tensorrt" in server.backends else "; it loads no TensorRT plans"
    carries = f"; TensorRT {server.tensorrt}" if server.tensorrt else ""
    return server.version or "", escape(f"{server.origin}; {backends}{carries}{without}")
