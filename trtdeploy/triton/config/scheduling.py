"""The parts of a config that say when and where requests run: batching, queues, CUDA graphs, versions."""

from __future__ import annotations

from typing import Any

from trtdeploy.errors import ModelError
from trtdeploy.plan import Manifest
from trtdeploy.triton.config.options import GraphSpec, PackageOptions, QueuePolicy
from trtdeploy.triton.config.schema import schema


def add_dynamic_batching(config: Any, options: PackageOptions) -> None:
    """Add the dynamic batcher where there is something to form batches of.

    Raises:
        ModelError: Options of the batcher are given for a model without batches, or a preferred batch is impossible.
    """
    asked = {
        "max_queue_delay_us": options.max_queue_delay_us,
        "preferred_batch_sizes": options.preferred_batch_sizes,
        "preserve_ordering": options.preserve_ordering,
        "queue_policy": options.queue_policy,
        "priorities": options.priorities,
    }
    given = [name for name, value in asked.items() if value]
    if config.max_batch_size <= 1:
        if given:
            raise ModelError(
                f"{', '.join(given)} need batches of more than one; max_batch_size is {config.max_batch_size}.",
                hint="Build the plan with a larger dynamic batch, or leave these options out.",
            )
        return
    impossible = [size for size in options.preferred_batch_sizes if not 1 <= size <= config.max_batch_size]
    if impossible:
        raise ModelError(
            f"preferred_batch_sizes {impossible} are not between 1 and max_batch_size {config.max_batch_size}.",
            hint="Build the plan with a larger --shape, or prefer smaller batches.",
        )
    priorities = options.priorities
    policies = [options.queue_policy, *(priorities.queue_policy.values() if priorities is not None else ())]
    delays = [policy for policy in policies if policy is not None and policy.timeout_action == "DELAY"]
    if options.preserve_ordering and (
        (priorities is not None and priorities.levels > 1) or any(p.timeout_us for p in delays)
    ):
        raise ModelError(
            "preserve_ordering excludes several priority levels, and DELAY as timeout_action.",
            hint="Triton refuses such a config; leave one of them out.",
        )
    batching = config.dynamic_batching
    batching.SetInParent()
    batching.max_queue_delay_microseconds = options.max_queue_delay_us
    batching.preferred_batch_size.extend(sorted(set(options.preferred_batch_sizes)))
    batching.preserve_ordering = options.preserve_ordering
    if options.queue_policy is not None:
        _fill_policy(batching.default_queue_policy, options.queue_policy)
    if priorities is not None:
        batching.priority_levels = priorities.levels
        batching.default_priority_level = priorities.default
        for level, policy in priorities.queue_policy.items():
            _fill_policy(batching.priority_queue_policy[level], policy)


def _fill_policy(message: Any, policy: QueuePolicy) -> None:
    message.SetInParent()
    message.timeout_action = schema().ModelQueuePolicy.TimeoutAction.Value(policy.timeout_action)
    message.default_timeout_microseconds = policy.timeout_us
    message.allow_timeout_override = policy.allow_timeout_override
    message.max_queue_size = policy.max_queue_size


def add_rate_limiter(group: Any, options: PackageOptions) -> None:
    """Add what an instance takes from the server's rate limiter."""
    if options.rate_limiter is None:
        return
    group.rate_limiter.priority = options.rate_limiter.priority
    for resource in options.rate_limiter.resources:
        added = group.rate_limiter.resources.add(name=resource.name, count=resource.count)
        setattr(added, "global", resource.shared)


def add_version_policy(config: Any, options: PackageOptions) -> None:
    """Add which versions are served; without one, Triton serves the latest."""
    policy = options.version_policy
    if policy is None:
        return
    if policy.latest is not None:
        config.version_policy.latest.num_versions = policy.latest
    elif policy.specific is not None:
        config.version_policy.specific.versions.extend(sorted(set(policy.specific)))
    else:
        config.version_policy.all.SetInParent()


def add_cuda_graphs(config: Any, manifest: Manifest, options: PackageOptions) -> None:
    """Add a complete ``graph_spec`` for every shape that was asked for.

    A graph is launched only for a request whose batch and dimensions are exactly those captured, unless a lower bound
    is given (``tensorrt_model.cc`` of the TensorRT backend).

    Raises:
        ModelError: A shape that no profile of the plan covers.
    """
    cuda = config.optimization.cuda
    cuda.graphs = True
    batched = config.max_batch_size > 0
    for wanted in options.cuda_graphs:
        dims = _graph_dims(wanted, manifest, batched=batched)
        _check_covered(wanted, dims, config.max_batch_size, manifest)
        spec = cuda.graph_spec.add(batch_size=wanted.batch_size)
        for name, sizes in dims.items():
            spec.input[name].dim.extend(sizes)
        if wanted.lower_bound_batch_size is not None:
            spec.graph_lower_bound.batch_size = wanted.lower_bound_batch_size
            for name, sizes in dims.items():
                spec.graph_lower_bound.input[name].dim.extend(sizes)


def _graph_dims(wanted: GraphSpec, manifest: Manifest, *, batched: bool) -> dict[str, tuple[int, ...]]:
    first = 1 if batched else 0
    names = [spec.name for spec in manifest.inputs]
    if wanted.dims is not None:
        if sorted(wanted.dims) != sorted(names):
            raise ModelError(
                f"A CUDA graph needs the dims of every input ({', '.join(names)}); given: {', '.join(wanted.dims)}."
            )
        return dict(wanted.dims)
    if manifest.profiles:
        return {name: manifest.profiles[0][name].opt[first:] for name in names if name in manifest.profiles[0]}
    return {spec.name: spec.shape[first:] for spec in manifest.inputs}


def _check_covered(
    wanted: GraphSpec, dims: dict[str, tuple[int, ...]], max_batch_size: int, manifest: Manifest
) -> None:
    if max_batch_size == 0 and wanted.batch_size != 0:
        raise ModelError(f"A CUDA graph with batch_size {wanted.batch_size} for a model without a batch: give 0.")
    if max_batch_size > 0 and not 1 <= wanted.batch_size <= max_batch_size:
        raise ModelError(f"A CUDA graph with batch_size {wanted.batch_size}; batches are 1 to {max_batch_size}.")
    leading = (wanted.batch_size,) if max_batch_size > 0 else ()
    shapes = {name: (*leading, *sizes) for name, sizes in dims.items()}
    if manifest.profiles and not any(
        all(name not in shapes or shapes_range.contains(shapes[name]) for name, shapes_range in profile.items())
        for profile in manifest.profiles
    ):
        raise ModelError(
            f"No profile of the plan covers the CUDA graph's shapes {shapes}.",
            hint="Build the plan with a profile that does, or choose a smaller batch_size.",
        )
