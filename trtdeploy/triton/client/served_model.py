"""What a server says of one model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.onnxgraph.reading.source import LABELS_KEY, PREPROCESSING_KEY
from trtdeploy.tensors import TensorSpec, dtype_from_triton
from trtdeploy.triton.config.options import CONTEXTS_KEY


@dataclass(frozen=True)
class ServedModel:
    """What a server says of one model.

    Attributes:
        name: Its name.
        version: The version that answers.
        inputs: Inputs with the batch dimension, -1 where dynamic.
        outputs: Outputs, likewise.
        max_batch_size: Largest batch of one request; 0 where the first dimension is not a batch.
        preprocessing: How images become its input, if it was packaged with that.
        labels: Its class names, if it was packaged with them.
        steps: The models that an ensemble runs; empty for any other model.
        stateful: Whether an answer depends on earlier requests (sequence batching).
        decoupled: Whether one request may have any number of answers.
        drops_late: Whether a request's own timeout counts in the model's queue.
        instances: How many batches are computed at a time: instances on all devices, times the contexts of each.
    """

    name: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    preprocessing: Preprocessing | None
    labels: tuple[str, ...] | None
    steps: tuple[str, ...] = ()
    stateful: bool = False
    decoupled: bool = False
    drops_late: bool = False
    instances: int = 1


def read_served_model(name: str, version: str, metadata: dict[str, Any], config: dict[str, Any]) -> ServedModel:
    """Read the server's answers about a model: its metadata and its config."""
    parameters = {key: entry.get("string_value", "") for key, entry in config.get("parameters", {}).items()}
    labels = parameters.get(LABELS_KEY)
    preprocessing = parameters.get(PREPROCESSING_KEY)
    policy = config.get("dynamic_batching", {}).get("default_queue_policy", {})
    return ServedModel(
        name=name,
        version=version or str(max(map(int, metadata.get("versions", ["1"])))),
        inputs=tuple(_spec(tensor) for tensor in metadata["inputs"]),
        outputs=tuple(_spec(tensor) for tensor in metadata["outputs"]),
        max_batch_size=int(config.get("max_batch_size", 0)),
        preprocessing=Preprocessing.from_json(preprocessing) if preprocessing is not None else None,
        labels=tuple(json.loads(labels)) if labels is not None else None,
        steps=tuple(step["model_name"] for step in config.get("ensemble_scheduling", {}).get("step", [])),
        stateful="sequence_batching" in config,
        decoupled=bool(config.get("model_transaction_policy", {}).get("decoupled", False)),
        # without a timeout of its own a queue ignores those of requests
        drops_late=bool(policy.get("allow_timeout_override"))
        and int(policy.get("default_timeout_microseconds", 0)) > 0,
        instances=_instances(config) * int(parameters.get(CONTEXTS_KEY, "1")),
    )


def _instances(config: Mapping[str, Any]) -> int:
    """Count instances on all devices; the server has filled in what the config left open."""
    groups = config.get("instance_group", [])
    return sum(int(group.get("count", 1)) * max(1, len(group.get("gpus", []))) for group in groups) or 1


def _spec(tensor: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(
        name=tensor["name"],
        dtype=dtype_from_triton(tensor["datatype"]),
        shape=tuple(int(size) for size in tensor["shape"]),
    )
