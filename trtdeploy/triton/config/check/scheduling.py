"""Dynamic batching, queues, priorities and the version policy (``ValidateModelConfig``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trtdeploy.triton.config.check.finding import Finding
from trtdeploy.triton.config.schema import schema


def scheduling_findings(config: Any) -> Iterator[Finding]:
    """Check how requests are batched and queued, and which versions are served."""
    if config.HasField("dynamic_batching"):
        yield from _dynamic_batching(config)
    policy = config.version_policy
    chosen = policy.WhichOneof("policy_choice")
    if config.HasField("version_policy") and chosen is None:
        yield Finding("version_policy", "it is empty.", "Give one of latest, all and specific.")
    if chosen == "latest" and policy.latest.num_versions < 1:
        yield Finding("version_policy.latest", "it serves no version.", "Give num_versions: 1 or more.")
    if chosen == "specific":
        bad = [version for version in policy.specific.versions if version < 1]
        if bad or not policy.specific.versions:
            yield Finding("version_policy.specific", f"versions are 1 or more, got {list(policy.specific.versions)}.")


def _dynamic_batching(config: Any) -> Iterator[Finding]:
    batching, where = config.dynamic_batching, "dynamic_batching"
    if config.max_batch_size == 0:
        yield Finding(
            where,
            "max_batch_size is 0: there is nothing to form batches of.",
            "Leave it out, or give max_batch_size.",
            severity="warning",
        )
    bad = [size for size in batching.preferred_batch_size if not 0 < size <= config.max_batch_size]
    if bad:
        yield Finding(
            f"{where}.preferred_batch_size", f"{bad} are not between 1 and max_batch_size {config.max_batch_size}."
        )
    levels = batching.priority_levels
    if levels:
        for name, given in (
            ("default_priority_level", [batching.default_priority_level]),
            ("priority_queue_policy", list(batching.priority_queue_policy)),
        ):
            outside = [level for level in given if not 1 <= level <= levels]
            if outside:
                yield Finding(f"{where}.{name}", f"{outside} are not between 1 and priority_levels {levels}.")
    elif batching.default_priority_level or batching.priority_queue_policy:
        yield Finding(
            f"{where}.priority_levels", "it is 0, so that priorities mean nothing.", "Give it.", severity="warning"
        )
    policies = {f"{where}.default_queue_policy": batching.default_queue_policy}
    policies |= {
        f"{where}.priority_queue_policy[{level}]": policy for level, policy in batching.priority_queue_policy.items()
    }
    for place, policy in policies.items():
        if policy.allow_timeout_override and not policy.default_timeout_microseconds:
            # Triton takes a request's timeout where it is shorter than the default one, and 0 is the shortest
            yield Finding(
                f"{place}.allow_timeout_override",
                "default_timeout_microseconds is 0, so that the timeouts of requests mean nothing.",
                "Give the longest timeout that a request may ask for.",
                severity="warning",
            )
    if batching.preserve_ordering:
        if levels > 1:
            yield Finding(f"{where}.preserve_ordering", "it excludes several priority levels.", "Leave one out.")
        delay = schema().ModelQueuePolicy.DELAY
        if any(p.default_timeout_microseconds and p.timeout_action == delay for p in policies.values()):
            yield Finding(f"{where}.preserve_ordering", "it excludes timeout_action: DELAY.", "Use REJECT.")
