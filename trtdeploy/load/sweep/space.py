"""What a sweep tries: instances, batching and loads, declared in YAML or derived from the plan and the machine."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtdeploy.errors import UsageError
from trtdeploy.plan import Manifest
from trtdeploy.triton.config import DEFAULT_MAX_BATCH_SIZE, PackageOptions
from trtdeploy.yaml_options import read_yaml

_MOST_LOADS = 500
_GPU_INSTANCES = (1, 2)
_DELAY_UNKNOWN_US = 500
_MOST_CONCURRENCY = 32
_SERVED_ALONE = 8

Count = Annotated[int, Field(ge=1, le=512)]
Batch = Annotated[int, Field(ge=1, lt=2**31)]
Delay = Annotated[int, Field(ge=0, lt=2**63)]


class Candidate(BaseModel):
    """One way to serve a model.

    Attributes:
        instances: Copies of the model that run at a time.
        max_batch_size: Largest batch that the server forms; None for a model without a batch.
        preferred_batch_sizes: Batches that run at once when they are complete.
        max_queue_delay_us: How long a request may wait for others, in microseconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    instances: int
    max_batch_size: int | None
    preferred_batch_sizes: tuple[int, ...]
    max_queue_delay_us: int

    @classmethod
    def of(cls, options: PackageOptions) -> Candidate:
        """Return how options serve a model."""
        return cls(
            instances=options.instances,
            max_batch_size=options.max_batch_size,
            preferred_batch_sizes=tuple(sorted(options.preferred_batch_sizes)),
            max_queue_delay_us=options.max_queue_delay_us,
        )

    def applied_to(self, options: PackageOptions) -> PackageOptions:
        """Return the options with these four replaced."""
        return options.model_copy(
            update={
                "instances": self.instances,
                "max_batch_size": self.max_batch_size,
                "preferred_batch_sizes": self.preferred_batch_sizes,
                "max_queue_delay_us": self.max_queue_delay_us,
            }
        )

    def __str__(self) -> str:
        parts = [f"{self.instances} instance{'s' if self.instances > 1 else ''}"]
        if self.max_batch_size is not None:
            parts.append(f"batch {self.max_batch_size}")
        if self.preferred_batch_sizes:
            parts.append(f"preferred {'+'.join(map(str, self.preferred_batch_sizes))}")
        if self.max_queue_delay_us:
            parts.append(f"delay {self.max_queue_delay_us} us")
        return ", ".join(parts)


class SweepSpace(BaseModel):
    """The values that are combined, each with each; unknown keys are refused.

    Attributes:
        instances: Copies of the model that run at a time.
        max_batch_size: Largest batches; empty for a model without a batch.
        preferred_batch_sizes: Sets of preferred batches; an empty set prefers none.
        max_queue_delay_us: How long a request may wait for others, in microseconds.
        concurrency: Closed-loop loads that every candidate is measured at.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    instances: tuple[Count, ...] = Field(min_length=1)
    max_batch_size: tuple[Batch, ...] = ()
    preferred_batch_sizes: tuple[tuple[Batch, ...], ...] = Field(default=((),), min_length=1)
    max_queue_delay_us: tuple[Delay, ...] = Field(default=(0,), min_length=1)
    concurrency: tuple[Count, ...] = Field(min_length=1)

    def candidates(self) -> list[Candidate]:
        """Return all combinations, without those that Triton serves alike.

        Batches of one wait for nobody, and a batch of the largest size needs no preference to run at once.
        """
        found: dict[Candidate, None] = {}
        for instances, batch, preferred, delay in product(
            self.instances, self.max_batch_size or (None,), self.preferred_batch_sizes, self.max_queue_delay_us
        ):
            alone = batch is None or batch == 1
            candidate = Candidate(
                instances=instances,
                max_batch_size=batch,
                preferred_batch_sizes=() if alone else tuple(sorted({*preferred} - {batch})),
                max_queue_delay_us=0 if alone else delay,
            )
            found[candidate] = None
        return list(found)


def read_space(path: str | Path, default: SweepSpace) -> SweepSpace:
    """Read a space from YAML; keys that it leaves out are as in ``default``.

    Raises:
        UsageError: The file cannot be read, holds an unknown key or an impossible value, or too many combinations.
    """
    source = Path(path)
    content = read_yaml(source, what="lists of values", example="instances: [1, 2]")
    try:
        space = SweepSpace.model_validate({**default.model_dump(), **content})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "space"
        raise UsageError(
            f"{source}: {where}: {first['msg']} (got {first['input']!r}).",
            hint=f"The keys are {', '.join(SweepSpace.model_fields)}; each has a list.",
        ) from error
    loads = len(space.candidates()) * len(space.concurrency)
    if loads > _MOST_LOADS:
        raise UsageError(f"{source} asks for {loads} loads; a sweep has at most {_MOST_LOADS}.", hint="Give less.")
    return space


def default_space(manifest: Manifest, options: PackageOptions, *, cores: int) -> SweepSpace:
    """Derive a small space from what the plan was built for, and what the machine has.

    Instances: powers of two up to as many as have cores for the plan's threads, and two in any case where there are two
    cores, for the work around a run overlaps; on a GPU one and two. Batches: one, and the served best (OPT) and largest
    (MAX) of the plan's profiles, with one in the middle where these are far apart. Preferred: none, and the profiles'
    OPT batches. Delay: none, and half of the plan's measured latency; waiting for longer than a run takes only adds to
    the latency of a loaded server, whose batches form while the last one runs.
    """
    threads = manifest.tactic.threads if manifest.tactic is not None else 1
    instances = (
        _GPU_INSTANCES if manifest.device.kind == "gpu" else tuple(_powers_up_to(max(min(2, cores), cores // threads)))
    )
    batches, preferred = _batches(manifest, options)
    latency_ms = min(manifest.tactic.milliseconds.values(), default=None) if manifest.tactic is not None else None
    delay_us = _DELAY_UNKNOWN_US if latency_ms is None else max(100, round(500 * latency_ms / 100) * 100)
    largest = max(instances) * max(batches, default=_SERVED_ALONE)
    return SweepSpace(
        instances=instances,
        max_batch_size=batches,
        preferred_batch_sizes=preferred,
        max_queue_delay_us=(0, delay_us) if batches else (0,),
        concurrency=tuple(sorted({1, 2 * max(instances), min(_MOST_CONCURRENCY, max(largest, 2 * max(instances)))})),
    )


def _powers_up_to(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length()) if 2**power <= limit]


def _batches(manifest: Manifest, options: PackageOptions) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Return the largest batches and the sets of preferred ones; none for a model without a batch."""
    if options.max_batch_size is None:
        return (), ((),)
    profiles = [profile for profile in manifest.profiles if profile]
    best = {min(shapes.opt[0] for shapes in profile.values()) for profile in profiles}
    largest = max((min(s.max[0] for s in profile.values()) for profile in profiles), default=DEFAULT_MAX_BATCH_SIZE)
    sizes = sorted(size for size in {1, largest, *best, options.max_batch_size} if size <= largest)
    if len(sizes) == 2 and largest >= 8:
        sizes.insert(1, 2 ** ((largest.bit_length() - 1 + 1) // 2))
    between = tuple(sorted(size for size in best if 1 < size < largest))
    return tuple(sizes), ((), between) if between else ((),)
