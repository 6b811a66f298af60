"""A manifest that cannot be that of what is served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import UsageError
from trtdeploy.plan import Manifest, Plan
from trtdeploy.tensors import TensorSpec
from trtdeploy.triton.client.served_model import ServedModel
from trtdeploy.triton.targets.plan_identity import check_served_plan

pytest.importorskip("tritonclient.grpc")


@pytest.fixture
def served(qdq_plan: Plan) -> ServedModel:
    """What a server says of the plan."""
    manifest = qdq_plan.manifest
    return ServedModel(
        name="m",
        version="1",
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        max_batch_size=32,
        preprocessing=manifest.preprocessing,
        labels=manifest.labels,
    )


def test_the_served_plan_is_taken(qdq_plan: Plan, served: ServedModel) -> None:
    check_served_plan(qdq_plan.manifest, "m.json", [served])
    # a config may leave out what it does not need, and leave open what the plan fixes
    open_sizes = tuple(TensorSpec(name=s.name, dtype=s.dtype, shape=(-1,) * len(s.shape)) for s in served.inputs)
    check_served_plan(
        qdq_plan.manifest, "m.json", [replace(served, inputs=open_sizes, preprocessing=None, labels=None)]
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: m.model_copy(
                update={"inputs": (TensorSpec(name="input", dtype="float16", shape=(-1, 3, 32, 32)),)}
            ),
            r"input input float16\[.* is input float32\[.* there\.",
        ),
        (
            lambda m: m.model_copy(update={"outputs": (TensorSpec(name="logits", dtype="float32", shape=(-1, 7)),)}),
            r"output logits .*, 7\] is logits .*, 10\] there",
        ),
        (
            lambda m: m.model_copy(update={"outputs": (TensorSpec(name="scores", dtype="float32", shape=(-1, 10)),)}),
            r"output scores .* is unknown there; output logits .* is unknown to the manifest",
        ),
        (lambda m: m.model_copy(update={"preprocessing": Preprocessing.square(31)}), "the preprocessing is another"),
        (lambda m: m.model_copy(update={"labels": m.labels[::-1]}), "the labels are others"),
    ],
    ids=["dtype", "classes", "name", "preprocessing", "labels"],
)
def test_what_differs_is_named(
    change: Callable[[Manifest], Manifest], words: str, qdq_plan: Plan, served: ServedModel
) -> None:
    with pytest.raises(
        UsageError, match=rf"m\.json describes another plan than the one that is served as m: .*{words}"
    ):
        check_served_plan(change(qdq_plan.manifest), "m.json", [served])


def test_one_model_of_an_ensemble_must_fit(qdq_plan: Plan, served: ServedModel) -> None:
    around = replace(served, name="before", inputs=served.outputs, outputs=served.inputs)
    check_served_plan(qdq_plan.manifest, "m.json", [around, served])
    other = qdq_plan.manifest.model_copy(update={"labels": None})
    with pytest.raises(UsageError, match="served as m: the labels"):
        check_served_plan(other, "m.json", [around, served])
