"""Whether the plan that a manifest describes can be the one that a server answers with."""

from __future__ import annotations

from collections.abc import Sequence

from trtdeploy.errors import UsageError
from trtdeploy.plan import Manifest
from trtdeploy.tensors import DYNAMIC, TensorSpec
from trtdeploy.triton.client.served_model import ServedModel


def check_served_plan(manifest: Manifest, name: str, candidates: Sequence[ServedModel]) -> None:
    """Refuse a manifest that contradicts what the server says.

    A server does not tell the hash of its plan. It tells tensors, preprocessing and labels, which differ between most
    networks, and not between two versions of one.

    Args:
        manifest: Of the plan.
        name: What people call the manifest.
        candidates: The model, or those that an ensemble runs: one of them must fit.

    Raises:
        UsageError: None fits; the message has what differs in the one that fits best.
    """
    found = {served.name: _differences(manifest, served) for served in candidates}
    closest = min(found, key=lambda model: len(found[model]))
    if found[closest]:
        raise UsageError(
            f"{name} describes another plan than the one that is served as {closest}: {'; '.join(found[closest])}.",
            hint="Give the manifest that lies beside the served plan (engine.plan.json in its version's folder).",
        )


def _differences(manifest: Manifest, served: ServedModel) -> list[str]:
    differences = [
        *_tensor_differences("input", manifest.inputs, served.inputs),
        *_tensor_differences("output", manifest.outputs, served.outputs),
    ]
    if served.preprocessing is not None and served.preprocessing != manifest.preprocessing:
        differences.append("the preprocessing is another")
    if served.labels is not None and served.labels != manifest.labels:
        differences.append("the labels are others")
    return differences


def _tensor_differences(kind: str, ours: Sequence[TensorSpec], theirs: Sequence[TensorSpec]) -> list[str]:
    known = {spec.name: spec for spec in theirs}
    differences = [f"{kind} {spec} is unknown there" for spec in ours if spec.name not in known]
    differences += [
        f"{kind} {spec} is {known[spec.name]} there"
        for spec in ours
        if spec.name in known and not _alike(spec, known[spec.name])
    ]
    names = {spec.name for spec in ours}
    return differences + [f"{kind} {spec} is unknown to the manifest" for spec in theirs if spec.name not in names]


def _alike(one: TensorSpec, other: TensorSpec) -> bool:
    """Say whether a tensor may be the other: a config may fix what the plan leaves open, and the other way round."""
    return (
        one.dtype == other.dtype
        and len(one.shape) == len(other.shape)
        and all(a == b or DYNAMIC in (a, b) for a, b in zip(one.shape, other.shape, strict=True))
    )
