"""How a plan shall be served: what is asked for on the command line or in ``serving.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from trtdeploy.errors import UsageError
from trtdeploy.frozen_model import FrozenModel
from trtdeploy.yaml_options import read_yaml

CONTEXTS_KEY = "trtdeploy.contexts"
DEFAULT_MAX_BATCH_SIZE = 32


class QueuePolicy(FrozenModel):
    """What happens to requests that wait.

    Attributes:
        timeout_action: Refuse a request that has waited too long, or let the others go first.
        timeout_us: How long is too long, in microseconds; 0 is for ever.
        allow_timeout_override: Whether a request may bring a timeout of its own, shorter than ``timeout_us``; Triton
            ignores longer ones, and all of them where ``timeout_us`` is 0.
        max_queue_size: How many may wait; more are refused at once. 0 is without a limit.
    """

    timeout_action: Literal["REJECT", "DELAY"] = "REJECT"
    timeout_us: int = Field(default=0, ge=0)
    allow_timeout_override: bool = False
    max_queue_size: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _shorter_than_something(self) -> QueuePolicy:
        if self.allow_timeout_override and not self.timeout_us:
            raise ValueError("allow_timeout_override needs timeout_us: Triton takes shorter timeouts only")
        return self


class Priorities(FrozenModel):
    """Levels of priority; 1 is the highest.

    Attributes:
        levels: How many there are.
        default: The level of a request that names none.
        queue_policy: The policy of single levels; the others have the model's.
    """

    levels: int = Field(ge=1)
    default: int = Field(ge=1)
    queue_policy: dict[int, QueuePolicy] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _inside(self) -> Priorities:
        outside = [level for level in (self.default, *self.queue_policy) if not 1 <= level <= self.levels]
        if outside:
            raise ValueError(f"priority levels are 1 to {self.levels}, got {outside}")
        return self


class GraphSpec(FrozenModel):
    """Shapes for which TensorRT's backend captures a CUDA graph at load.

    Attributes:
        batch_size: The batch; 0 for a model without one.
        dims: Dimensions of every input without the batch; None takes the best served ones of the first profile.
        lower_bound_batch_size: Smaller batches down to this one run in the graph too, padded with whatever the
            buffers hold.
    """

    batch_size: int = Field(ge=0)
    dims: dict[str, tuple[int, ...]] | None = None
    lower_bound_batch_size: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> GraphSpec:
        if self.lower_bound_batch_size is not None and self.lower_bound_batch_size > self.batch_size:
            raise ValueError(f"lower_bound_batch_size {self.lower_bound_batch_size} is above {self.batch_size}")
        return self


class Resource(FrozenModel):
    """A resource that an execution takes; the server's rate limiter counts them."""

    name: str = Field(min_length=1)
    count: int = Field(ge=1, lt=2**32)
    shared: bool = False  # "global" in Triton: one count for all devices


class RateLimiter(FrozenModel):
    """How instances compete, on a server that runs with ``--rate-limit=execution_count``."""

    resources: tuple[Resource, ...] = ()
    priority: int = Field(default=0, ge=0, lt=2**32)


class VersionPolicy(FrozenModel):
    """Which versions are served; exactly one of the three."""

    latest: int | None = Field(default=None, ge=1, lt=2**32)
    specific: tuple[int, ...] | None = Field(default=None, min_length=1)
    all: Literal[True] | None = None

    @model_validator(mode="after")
    def _one(self) -> VersionPolicy:
        if sum(given is not None for given in (self.latest, self.specific, self.all)) != 1:
            raise ValueError("give exactly one of latest, specific and all")
        return self


class Warmup(FrozenModel):
    """Requests that every instance answers before the model is ready.

    Attributes:
        samples: One sample per input, ``.npy`` files in the input's data type, without the batch.
        batch_sizes: Batches to warm up; none takes the preferred ones, 1 and the largest.
        count: How often each is run.
    """

    samples: dict[str, Path] = Field(min_length=1)
    batch_sizes: tuple[int, ...] = ()
    count: int = Field(default=1, ge=1, lt=2**32)


class PackageOptions(FrozenModel):
    """How a plan shall be served; unknown keys are refused.

    Attributes:
        max_batch_size: Largest batch that Triton forms; None takes the profiles' largest, or 32 where the plan has a
            dynamic batch and no profile.
        instances: How many copies of the model Triton runs at the same time, on each GPU.
        contexts: Execution contexts inside each instance of a Python-backend model.
        max_queue_delay_us: How long a request may wait for others to share its batch, in microseconds.
        preferred_batch_sizes: Batches that run at once when they are complete.
        preserve_ordering: Whether answers come in the order of the requests.
        queue_policy: What happens to requests that wait.
        priorities: Levels of priority.
        gpus: Device ids to run on; none is all of the server's.
        profiles: Optimization profiles that get a context; none is all of the plan's. TensorRT only.
        cuda_graphs: Shapes to capture as CUDA graphs. TensorRT only.
        response_cache: Whether equal requests are answered from the server's cache.
        rate_limiter: How instances compete.
        version_policy: Which versions are served.
        warmup: Requests that are answered before the model is ready.
    """

    max_batch_size: int | None = Field(default=None, ge=1, lt=2**31)
    instances: int = Field(default=1, ge=1, lt=2**31)
    contexts: int = Field(default=1, ge=1)
    max_queue_delay_us: int = Field(default=0, ge=0, lt=2**64)
    preferred_batch_sizes: tuple[int, ...] = ()
    preserve_ordering: bool = False
    queue_policy: QueuePolicy | None = None
    priorities: Priorities | None = None
    gpus: tuple[int, ...] = ()
    profiles: tuple[int, ...] = ()
    cuda_graphs: tuple[GraphSpec, ...] = ()
    response_cache: bool = False
    rate_limiter: RateLimiter | None = None
    version_policy: VersionPolicy | None = None
    warmup: Warmup | None = None


def read_options(path: str | Path, **overrides: object) -> PackageOptions:
    """Read options from YAML; what ``overrides`` gives, and is not None, goes before the file.

    Paths of samples are relative to the file.

    Raises:
        UsageError: The file cannot be read, is not YAML, or holds an unknown key or an impossible value.
    """
    source = Path(path)
    given = read_yaml(source, example="instances: 2")
    given |= {key: value for key, value in overrides.items() if value is not None}
    try:
        options = PackageOptions.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "options"
        known = ", ".join(sorted(PackageOptions.model_fields))
        raise UsageError(
            f"{source}: {where}: {str(first['msg']).removeprefix('Value error, ')}.", hint=f"The options are: {known}."
        ) from error
    if options.warmup is not None:
        samples = {name: source.parent / sample for name, sample in options.warmup.samples.items()}
        options = options.model_copy(update={"warmup": options.warmup.model_copy(update={"samples": samples})})
    return options
