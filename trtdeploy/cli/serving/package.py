"""``trtdeploy package`` and ``publish``: a plan goes into a model repository."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtdeploy.cli.console import door, interrupt, print_json
from trtdeploy.cli.options.local_folder import local_folder
from trtdeploy.errors import GateError, UsageError

if TYPE_CHECKING:
    from trtdeploy.plan import Manifest
    from trtdeploy.tensors import Array
    from trtdeploy.triton.config import DeviceMemory, PackageOptions
    from trtdeploy.triton.repository.differences.deployed import Comparison

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
PlanFile = Annotated[Path, typer.Argument(dir_okay=False, help="A plan; its manifest PLAN.json must lie beside it.")]
Name = Annotated[str, typer.Option("--name", help="Model name in Triton.")]
NewRepository = Annotated[
    Path, typer.Option("--repository", callback=local_folder, help="The model repository; made if it is not there.")
]
NewVersion = Annotated[int | None, typer.Option("--version", help="Version (default: the next free one).")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", dir_okay=False, help="YAML with serving options; the flags go before it.")
]
MaxBatchSize = Annotated[
    int | None,
    typer.Option("--max-batch-size", min=1, help="Largest batch (default: from the plan's profiles, else 32)."),
]
Instances = Annotated[
    int | None, typer.Option("--instances", min=1, help="Copies of the model that run at a time (default: 1).")
]
Contexts = Annotated[
    int | None, typer.Option("--contexts", min=1, help="Execution contexts in each instance (default: 1).")
]
MaxQueueDelay = Annotated[
    int | None,
    typer.Option(
        "--max-queue-delay-us", min=0, help="How long a request may wait for others, in microseconds (default: 0)."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(package)
    app.command()(publish)


def package(
    plan: PlanFile,
    name: Name,
    repository: NewRepository,
    version: NewVersion = None,
    config: ConfigFile = None,
    max_batch_size: MaxBatchSize = None,
    instances: Instances = None,
    contexts: Contexts = None,
    max_queue_delay_us: MaxQueueDelay = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing: compare with what is deployed; exit code 1 if it differs.")
    ] = False,
    ensemble: Annotated[
        bool,
        typer.Option("--ensemble", help="Also NAME_pipeline: JPEG or PNG bytes in, labels and probabilities out."),
    ] = False,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="How many labels NAME_pipeline answers with (default: 5).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add a plan to a Triton model repository, as a new version that appears as a whole.

    A model that was published before goes on as it is: the new version is served once it is promoted.
    """
    with door():
        from trtdeploy.plan import read_manifest
        from trtdeploy.triton.config import predicted_memory
        from trtdeploy.triton.pipeline import package_pipeline
        from trtdeploy.triton.pipeline.comparison import compare_pipeline
        from trtdeploy.triton.pipeline.package import DEFAULT_TOP_K
        from trtdeploy.triton.repository.differences.deployed import compare
        from trtdeploy.triton.repository.layout import active_version
        from trtdeploy.triton.repository.package import package as run

        if top_k is not None and not ensemble:
            raise UsageError(f"--top-k {top_k} is for NAME_pipeline.", hint="Add --ensemble, or leave it out.")
        count = top_k if top_k is not None else DEFAULT_TOP_K
        options = _options(config, max_batch_size, instances, contexts, max_queue_delay_us)
        if check and ensemble:
            whole = compare_pipeline(plan, repository, name, options, top_k=count)
            _show_comparison(whole.model, as_json, whole.parts)
            return
        if check:
            _show_comparison(compare(plan, repository, name, options), as_json)
            return
        pipeline = None
        if ensemble:
            made = package_pipeline(plan, repository, name, version=version, options=options, top_k=count)
            packaged, pipeline = made.model, made.pipeline
        else:
            packaged = run(plan, repository, name, version=version, options=options)
        memory = predicted_memory(read_manifest(plan), options)
        active = active_version(packaged.folder)
        facts: dict[str, Any] = {"name": packaged.name, "version": packaged.version, "folder": str(packaged.folder)}
        facts["active"] = active
        if pipeline is not None:
            facts["pipeline"] = pipeline
        if as_json:
            print_json({**facts, "predicted_memory": _memory_facts(memory)})
        else:
            where = f"{packaged.folder}: version {packaged.version}"
            typer.echo(where if active == packaged.version else f"{where}, active is {active}")
            if pipeline is not None:
                typer.echo(f"{pipeline} takes image files and answers with labels")
            typer.echo(_memory_text(memory))


def publish(
    plan: PlanFile,
    name: Name,
    repository: Annotated[
        str, typer.Option("--repository", help="The model repository, or its URL; made if it is not there.")
    ],
    version: NewVersion = None,
    config: ConfigFile = None,
    max_batch_size: MaxBatchSize = None,
    instances: Instances = None,
    contexts: Contexts = None,
    max_queue_delay_us: MaxQueueDelay = None,
    sample: Annotated[
        list[str] | None,
        typer.Option("--sample", help="NAME=FILE.npy, a known input to test a server with (default: noise)."),
    ] = None,
    other_gpu: Annotated[
        list[Path] | None,
        typer.Option("--other-gpu", dir_okay=False, help="A plan of the same model for another compute capability."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add a version that is not served before it is promoted, and say which Triton releases load it."""
    with door():
        from trtdeploy.doctor.triton_releases import preflight
        from trtdeploy.plan import read_manifest
        from trtdeploy.triton.config import predicted_memory
        from trtdeploy.triton.repository.layout import active_version
        from trtdeploy.triton.repository.remote import checked_out, is_url
        from trtdeploy.triton.repository.versions import publish as run

        options = _options(config, max_batch_size, instances, contexts, max_queue_delay_us)
        manifest = read_manifest(plan)
        known = _sample(sample, manifest)
        if is_url(repository):
            signal.signal(signal.SIGTERM, interrupt)  # what the store has got by then has to be taken back
        with checked_out(repository, name) as root:
            published = run(
                plan, root, name, version=version, options=options, sample=known, other_gpus=other_gpu or ()
            )
            active = active_version(published.folder)
        where = f"{repository.rstrip('/')}/{name}"
        memory = predicted_memory(manifest, options)
        releases = preflight(manifest)
        if as_json:
            facts = {"name": name, "version": published.version, "folder": where, "active": active}
            print_json({**facts, "predicted_memory": _memory_facts(memory), "triton_releases": releases})
            return
        typer.echo(f"{where}: version {published.version}, active is {active}")
        typer.echo(_memory_text(memory))
        for verdict, names in releases.items():
            if names:
                typer.echo(f"Triton containers, {verdict}: {', '.join(names)}")


def _options(
    path: Path | None,
    max_batch_size: int | None,
    instances: int | None,
    contexts: int | None,
    max_queue_delay_us: int | None,
) -> PackageOptions:
    from trtdeploy.triton.config import PackageOptions, read_options

    flags: dict[str, Any] = {
        "max_batch_size": max_batch_size,
        "instances": instances,
        "contexts": contexts,
        "max_queue_delay_us": max_queue_delay_us,
    }
    if path is not None:
        return read_options(path, **flags)
    return PackageOptions.model_validate({key: value for key, value in flags.items() if value is not None})


def _sample(texts: list[str] | None, manifest: Manifest) -> dict[str, Array] | None:
    import numpy as np

    if not texts:
        return None
    arrays: dict[str, Array] = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not separator or name not in {spec.name for spec in manifest.inputs}:
            raise UsageError(f"--sample {text!r} is not NAME=FILE.npy with an input's name.")
        try:
            arrays[name] = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UsageError(f"--sample {path} cannot be read as a .npy file: {error}") from error
    return arrays


def _show_comparison(comparison: Comparison, as_json: bool, parts: Mapping[str, str] | None = None) -> None:
    """Show a comparison, with the differences of the other models of its pipeline by name, and end with its verdict."""
    same = comparison.same and not any((parts or {}).values())
    if as_json:
        print_json(
            {
                "same": same,
                "config_diff": comparison.config_diff,
                **({"pipeline_diff": dict(parts)} if parts is not None else {}),
                "deployed_as": list(comparison.deployed_as),
                "active": comparison.active,
                "findings": [str(finding) for finding in comparison.findings],
                "predicted_memory": _memory_facts(comparison.memory),
            }
        )
    else:
        for finding in comparison.findings:
            typer.echo(str(finding))
        if comparison.config_diff:
            typer.echo(comparison.config_diff)
        for diff in (parts or {}).values():
            if diff:
                typer.echo(diff)
        typer.echo(f"this plan is version {list(comparison.deployed_as) or 'none'}; active is {comparison.active}")
        typer.echo(_memory_text(comparison.memory))
        typer.echo("same" if same else "different")
    if not same:
        raise typer.Exit(GateError.exit_code)


def _memory_facts(memory: DeviceMemory) -> dict[str, Any]:
    return {
        "engine_bytes": memory.engine_bytes,
        "copies": memory.copies,
        "total_bytes": memory.total_bytes,
        "reason": memory.reason,
    }


def _memory_text(memory: DeviceMemory) -> str:
    return (
        f"memory of the engines: {memory.copies} x {memory.engine_bytes / 2**20:.1f} MiB = "
        f"{memory.total_bytes / 2**20:.1f} MiB on each device ({memory.reason})"
    )
