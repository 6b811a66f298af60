"""The options that a deployed config was derived from: the way back from ``config.pbtxt`` to ``PackageOptions``."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import numpy as np

from trtdeploy.errors import RepositoryError
from trtdeploy.plan import Manifest
from trtdeploy.tensors import dtype_from_triton
from trtdeploy.triton.config.options import (
    CONTEXTS_KEY,
    GraphSpec,
    PackageOptions,
    Priorities,
    QueuePolicy,
    RateLimiter,
    Resource,
    VersionPolicy,
    Warmup,
)
from trtdeploy.triton.config.render import config_text, make_config
from trtdeploy.triton.config.schema import schema
from trtdeploy.triton.config.warmup import WARMUP_FOLDER

_SHOWN_LINES = 12


def options_of(config: Any, manifest: Manifest, folder: Path, samples: Path) -> PackageOptions:
    """Return options from which ``make_config`` derives this very config.

    Args:
        config: The deployed ``ModelConfig``.
        manifest: Of the plan that it serves.
        folder: The model's folder; warm-up requests lie in it.
        samples: An empty folder, for the samples of warm-up requests as options name them. It must outlive the options.

    Raises:
        RepositoryError: The config says something that no options lead to, an edit by hand for example.
    """
    try:
        options = PackageOptions(
            max_batch_size=config.max_batch_size or None,
            instances=config.instance_group[0].count,
            contexts=_contexts(config),
            gpus=tuple(config.instance_group[0].gpus),
            profiles=tuple(map(int, config.instance_group[0].profile)),
            cuda_graphs=tuple(_graph(spec) for spec in config.optimization.cuda.graph_spec),
            response_cache=config.response_cache.enable,
            rate_limiter=_rate_limiter(config.instance_group[0]),
            version_policy=_version_policy(config),
            warmup=_warmup(config, folder, samples),
            **_batching(config.dynamic_batching),
        )
        derived = make_config(manifest, folder.name, options)
    except (ValueError, LookupError, OSError) as error:
        raise RepositoryError(
            f"{folder / 'config.pbtxt'} is none that trtdeploy derives: {error}.", hint="Package the plan again."
        ) from error
    # which file is for which GPU is a fact of the version, not an option
    derived.cc_model_filenames.update(config.cc_model_filenames)
    if derived != config:
        ours, theirs = config_text(derived).splitlines(), config_text(config).splitlines()
        changed = [line for line in difflib.ndiff(ours, theirs) if line[:1] in "+-"][:_SHOWN_LINES]
        raise RepositoryError(
            f"{folder / 'config.pbtxt'} has been edited: trtdeploy derives none with these lines (+) or without those "
            "(-).",
            hint="What a derived config would lose is yours to decide: package the plan again with the options that "
            "you want.",
            log_lines=changed,
        )
    return options


def _contexts(config: Any) -> int:
    return int(config.parameters[CONTEXTS_KEY].string_value) if CONTEXTS_KEY in config.parameters else 1


def _batching(batching: Any) -> dict[str, Any]:
    policies = batching.priority_queue_policy
    return {
        "max_queue_delay_us": batching.max_queue_delay_microseconds,
        "preferred_batch_sizes": tuple(batching.preferred_batch_size),
        "preserve_ordering": batching.preserve_ordering,
        "queue_policy": _policy(batching.default_queue_policy) if batching.HasField("default_queue_policy") else None,
        "priorities": Priorities(
            levels=batching.priority_levels,
            default=batching.default_priority_level,
            queue_policy={int(level): _policy(policies[level]) for level in policies},
        )
        if batching.priority_levels
        else None,
    }


def _policy(message: Any) -> QueuePolicy:
    return QueuePolicy.model_validate(
        {
            "timeout_action": schema().ModelQueuePolicy.TimeoutAction.Name(message.timeout_action),
            "timeout_us": message.default_timeout_microseconds,
            "allow_timeout_override": message.allow_timeout_override,
            "max_queue_size": message.max_queue_size,
        }
    )


def _graph(spec: Any) -> GraphSpec:
    return GraphSpec(
        batch_size=spec.batch_size,
        dims={name: tuple(spec.input[name].dim) for name in spec.input},
        lower_bound_batch_size=spec.graph_lower_bound.batch_size if spec.HasField("graph_lower_bound") else None,
    )


def _rate_limiter(group: Any) -> RateLimiter | None:
    if not group.HasField("rate_limiter"):
        return None
    return RateLimiter(
        priority=group.rate_limiter.priority,
        resources=tuple(
            Resource(name=resource.name, count=resource.count, shared=getattr(resource, "global"))
            for resource in group.rate_limiter.resources
        ),
    )


def _version_policy(config: Any) -> VersionPolicy | None:
    policy = config.version_policy
    chosen = policy.WhichOneof("policy_choice")
    if chosen == "latest":
        return VersionPolicy(latest=policy.latest.num_versions)
    if chosen == "specific":
        return VersionPolicy(specific=tuple(policy.specific.versions))
    return VersionPolicy(all=True) if chosen == "all" else None


def _warmup(config: Any, folder: Path, samples: Path) -> Warmup | None:
    requests = list(config.model_warmup)
    if not requests:
        return None
    paths: dict[str, Path] = {}
    for name in requests[0].inputs:
        value = requests[0].inputs[name]
        content = (folder / WARMUP_FOLDER / value.input_data_file).read_bytes()
        dtype = dtype_from_triton(schema().DataType.Name(value.data_type).removeprefix("TYPE_"))
        paths[name] = samples / f"{len(paths)}.npy"
        np.save(paths[name], np.frombuffer(content, dtype).reshape(list(value.dims)))
    sizes = [request.batch_size for request in requests]
    usual = {1, config.max_batch_size or 1, *config.dynamic_batching.preferred_batch_size}
    # the usual ones follow the batch sizes of other options
    return Warmup(samples=paths, batch_sizes=() if set(sizes) == usual else tuple(sizes), count=requests[0].count)
