"""Sequence batching: its controls, states and strategies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from trtdeploy.triton.config.check.finding import Finding
from trtdeploy.triton.config.schema import schema

_VALUES = ("int32_false_true", "fp32_false_true", "bool_false_true")


def sequence_findings(config: Any) -> Iterator[Finding]:
    """Check a model with a sequence batcher."""
    if not config.HasField("sequence_batching"):
        return
    batcher = config.sequence_batching
    pb = schema()
    control_kinds = pb.ModelSequenceBatching.Control.Kind
    corrid = control_kinds.Value("CONTROL_SEQUENCE_CORRID")
    ids = {pb.TYPE_UINT64, pb.TYPE_INT64, pb.TYPE_UINT32, pb.TYPE_INT32, pb.TYPE_STRING}
    seen: Counter[int] = Counter()
    names: Counter[str] = Counter()
    for index, tensor in enumerate(batcher.control_input):
        where = f"sequence_batching.control_input[{index}]"
        names[tensor.name] += 1
        if not tensor.name:
            yield Finding(f"{where}.name", "it is missing.", "Give the name of the model's input for this control.")
        for control in tensor.control:
            seen[control.kind] += 1
            kind = control_kinds.Name(control.kind)
            given = [name for name in _VALUES if getattr(control, name)]
            if control.kind == corrid:
                if given:
                    yield Finding(where, f"{kind} has no values for false and true.", "Give data_type only.")
                if control.data_type not in ids:
                    yield Finding(where, f"{kind} needs a data_type of integers or TYPE_STRING.")
                continue
            if len(given) != 1:
                yield Finding(where, f"{kind} needs exactly one of {', '.join(_VALUES)}; got {given}.")
            elif len(getattr(control, given[0])) != 2:
                yield Finding(f"{where}.{given[0]}", "two values are expected: for false and for true.")
            if control.data_type != pb.TYPE_INVALID:
                yield Finding(where, f"{kind} takes its data type from its values.", "Leave data_type out.")
    for control_kind, count in seen.items():
        if count > 1:
            yield Finding("sequence_batching.control_input", f"{control_kinds.Name(control_kind)} is there twice.")
    yield from (
        Finding("sequence_batching.control_input", f"{name!r} is there twice.")
        for name, count in names.items()
        if name and count > 1
    )
    yield from _strategy(batcher, config.max_batch_size)
    for index, state in enumerate(batcher.state):
        if not (state.input_name and state.output_name and state.data_type and state.dims):
            yield Finding(f"sequence_batching.state[{index}]", "it needs input_name, output_name, data_type and dims.")
        if any(size < 1 and size != -1 for size in state.dims):
            yield Finding(f"sequence_batching.state[{index}].dims", "sizes are 1 or more, or -1 where they vary.")


def _strategy(batcher: Any, max_batch_size: int) -> Iterator[Finding]:
    if batcher.HasField("oldest"):
        bad = [size for size in batcher.oldest.preferred_batch_size if not 0 < size <= max_batch_size]
        if bad:
            yield Finding(
                "sequence_batching.oldest.preferred_batch_size",
                f"{bad} are not between 1 and max_batch_size {max_batch_size}.",
            )
        if batcher.oldest.max_candidate_sequences < 0:
            yield Finding("sequence_batching.oldest.max_candidate_sequences", "it is negative.")
    if batcher.HasField("direct") and not 0 <= batcher.direct.minimum_slot_utilization <= 1:
        yield Finding("sequence_batching.direct.minimum_slot_utilization", "it is a share between 0 and 1.")
