"""Whether all who answer for one model give the same answer: its instances, and its versions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from trtdeploy.data.dataset import Split
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.frozen_model import FrozenModel
from trtdeploy.ledger import StageOutputs
from trtdeploy.statistics import PairedDifference
from trtdeploy.validation.spread import change_percent, rows
from trtdeploy.validation.target import Target

_SAMPLES = 8
_REQUESTS_OF_EACH = 4
_LARGEST_REQUEST_BYTES = 32 << 20


@dataclass(frozen=True)
class Consistency:
    """What was looked at besides the answers themselves.

    Attributes:
        variation: Largest change of a score by its cause; None where that was not asked for. See ``measure_variation``.
        instances: Whether all instances answer alike; None where that was not asked for.
        versions: The answers against those of other versions.
    """

    variation: dict[str, float] | None
    instances: InstanceConsistency | None
    versions: tuple[VersionComparison, ...]


class InstanceConsistency(FrozenModel):
    """What came of sending one request again and again, so that every instance answers it.

    Attributes:
        instances: How many of them the target has, with their contexts.
        requests: Requests that were sent.
        batch_size: Samples of each.
        differing: Answers that are not the first one bit for bit.
        largest: Largest difference of a score from the first answer, in percent of the spread of its sample's scores.
    """

    instances: int
    requests: int
    batch_size: int
    differing: int
    largest: float


class VersionComparison(FrozenModel):
    """The answers of the version that is validated against those of another one, sample by sample.

    Attributes:
        version: The other version.
        n: Samples that both were asked.
        agreement: Percent of samples with the same answer.
        difference: Paired difference of accuracies in percentage points: the validated version minus this one.
        largest: Largest difference of a score, in percent of the spread of the other version's scores; None where they
            score other classes.
        largest_at: The sample where that is.
    """

    version: str
    n: int
    agreement: float
    difference: PairedDifference
    largest: float | None
    largest_at: str | None


def measure_instances(target: Target, split: Split, preprocessing: Preprocessing | None) -> InstanceConsistency:
    """Send one request from several threads at once, often enough that every instance answers it.

    The request fills a whole batch. So Triton cannot join two of them, which would let a kernel add in another order:
    what differs then differs between instances. With twice as many requests in flight as instances none is idle.

    Raises:
        ServerError: A request failed, or was not answered with one row of finite scores per sample.
    """
    samples = target.prepare(split, preprocessing, range(min(_SAMPLES, len(split))))
    most = max(1, _LARGEST_REQUEST_BYTES // samples[0].nbytes)
    size = 1 if target.input.shape[0] == 1 else min(target.max_batch_size or len(samples), most)
    batch = np.ascontiguousarray(np.resize(samples, (size, *samples.shape[1:])))
    first = rows(target, batch)
    requests = _REQUESTS_OF_EACH * target.instances
    with ThreadPoolExecutor(2 * target.instances) as threads:
        others = list(threads.map(lambda _: rows(target, batch), range(requests)))
    return InstanceConsistency(
        instances=target.instances,
        requests=requests + 1,
        batch_size=size,
        differing=sum(other.tobytes() != first.tobytes() for other in others),
        largest=max(float(change_percent(other, first).max()) for other in others),
    )


def compare_versions(version: str, outputs: StageOutputs, other: StageOutputs) -> VersionComparison:
    """Compare what the validated version answered with what ``version`` answered.

    Raises:
        LedgerError: They were asked other samples.
    """
    difference = outputs.compared_with(other)
    change = change_percent(outputs.logits, other.logits) if outputs.logits.shape == other.logits.shape else None
    return VersionComparison(
        version=version,
        n=len(outputs.ids),
        agreement=outputs.agreement(other),
        difference=difference,
        largest=float(change.max()) if change is not None else None,
        largest_at=outputs.ids[int(change.argmax())] if change is not None else None,
    )
