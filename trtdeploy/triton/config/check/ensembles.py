"""Ensembles: every edge is written once, read, reachable, and of one data type and shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trtdeploy.triton.config.check.finding import Finding
from trtdeploy.triton.config.schema import schema


def ensemble_findings(config: Any, folder: Path | None) -> Iterator[Finding]:
    """Check an ensemble's graph, and its edges against the models that lie beside it."""
    is_ensemble, has_steps = config.platform == "ensemble", config.HasField("ensemble_scheduling")
    if not is_ensemble and not has_steps:
        return
    if not is_ensemble:
        yield Finding("platform", f"ensemble_scheduling with platform {config.platform!r}.", 'Give "ensemble".')
    for field in ("instance_group", "model_warmup"):
        if len(getattr(config, field)):
            yield Finding(field, "an ensemble has none: its steps have.", "Leave it out.")
    if config.HasField("optimization"):
        yield Finding("optimization", "an ensemble has none: its steps have.", "Leave it out.")
    if not config.ensemble_scheduling.step:
        yield Finding("ensemble_scheduling.step", "there is none.", "Name the models and how their tensors connect.")
        return
    yield from _steps(config)
    if folder is not None:
        yield from edge_findings(config, folder)


def _steps(config: Any) -> Iterator[Finding]:
    written: set[str] = set()
    read: set[str] = set()
    needs: list[tuple[set[str], set[str]]] = []
    for index, step in enumerate(config.ensemble_scheduling.step):
        where = f"ensemble_scheduling.step[{index}]"
        for field in ("model_name", "input_map", "output_map"):
            if not getattr(step, field):
                yield Finding(f"{where}.{field}", "it is missing.", "Give it.")
        if step.model_name == config.name:
            yield Finding(f"{where}.model_name", "the ensemble contains itself.")
        outputs = list(step.output_map.values())
        twice = {name for name in outputs if name in written or outputs.count(name) > 1}
        if twice:
            yield Finding(f"{where}.output_map", f"{sorted(twice)} are written twice.", "Give them other names.")
        written.update(outputs)
        read.update(step.input_map.values())
        needs.append((set(step.input_map.values()), set(outputs)))
    given = {tensor.name for tensor in config.input}
    wanted = {tensor.name for tensor in config.output}
    for name in sorted(given & written):
        yield Finding("ensemble_scheduling", f"the input {name!r} is written by a step.")
    for name in sorted(given - read):
        yield Finding("input", f"{name!r} is used by no step.", "Connect it in an input_map, or leave it out.")
    ready = set(given)
    while True:
        new = {name for before, after in needs if before <= ready for name in after} - ready
        if not new:
            break
        ready |= new
    for name in sorted((wanted | read) - ready):
        reason = "by a step that waits for itself" if name in written else "by no step"
        yield Finding("ensemble_scheduling", f"{name!r} is written {reason}.", "Connect it in an output_map.")
    for name in sorted(written - read - wanted):
        yield Finding("ensemble_scheduling", f"{name!r} is written and never read.", "Leave it out of output_map.")


def edge_findings(config: Any, folder: Path, *, instead: Mapping[str, Any] | None = None) -> Iterator[Finding]:
    """Check an ensemble's edges against the configs of its steps.

    Args:
        config: The ensemble's.
        folder: Its folder; the models lie beside it.
        instead: Configs to take for models by name, in place of those that are there.
    """
    from google.protobuf import text_format

    pb = schema()
    edges: dict[str, tuple[int, list[int], str]] = {}
    for kind in ("input", "output"):
        for tensor in getattr(config, kind):
            edges[tensor.name] = (tensor.data_type, _full(tensor, config.max_batch_size), f"{kind} {tensor.name}")
    for index, step in enumerate(config.ensemble_scheduling.step):
        where = f"ensemble_scheduling.step[{index}]"
        path = folder.parent / step.model_name / "config.pbtxt"
        model = (instead or {}).get(step.model_name)
        try:
            model = model or text_format.Parse(path.read_text(), pb.ModelConfig())
        except (OSError, UnicodeDecodeError, text_format.ParseError, ValueError) as error:
            yield Finding(f"{where}.model_name", f"the config of {step.model_name!r} cannot be read: {error}.")
            continue
        if config.max_batch_size > model.max_batch_size > 0 or (config.max_batch_size > 0 == model.max_batch_size):
            yield Finding(
                "max_batch_size",
                f"{config.max_batch_size} is more than {step.model_name} takes: {model.max_batch_size}.",
            )
        for field, kind in (("input_map", "input"), ("output_map", "output")):
            tensors = {tensor.name: tensor for tensor in getattr(model, kind)}
            mapping = getattr(step, field)
            for name, edge in mapping.items():
                if name not in tensors:
                    yield Finding(
                        f"{where}.{field}", f"{step.model_name} has no {kind} {name!r}.", f"It has {sorted(tensors)}."
                    )
                    continue
                facts = (tensors[name].data_type, _full(tensors[name], model.max_batch_size))
                known = edges.setdefault(edge, (*facts, f"{step.model_name}'s {name}"))
                if known[0] != facts[0] or not _compatible(known[1], facts[1]):
                    yield Finding(
                        f"{where}.{field}",
                        f"{edge!r} is {pb.DataType.Name(known[0])}{known[1]} for {known[2]} and "
                        f"{pb.DataType.Name(facts[0])}{facts[1]} for {step.model_name}'s {name}.",
                    )
            absent = [
                name
                for name, tensor in tensors.items()
                if name not in mapping and not getattr(tensor, "optional", False)
            ]
            if kind == "input" and absent:
                yield Finding(f"{where}.{field}", f"the inputs {absent} of {step.model_name} are missing.")


def _full(tensor: Any, max_batch_size: int) -> list[int]:
    return [-1, *tensor.dims] if max_batch_size > 0 else list(tensor.dims)


def _compatible(one: list[int], other: list[int]) -> bool:
    return len(one) == len(other) and all(-1 in pair or pair[0] == pair[1] for pair in zip(one, other, strict=True))
