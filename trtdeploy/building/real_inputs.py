"""Real inputs for a build, from the samples that ``--data`` names and from what ``--fixed`` says."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from trtdeploy.data.fixed_inputs import parse_fixed
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.data.samples import Samples, open_samples
from trtdeploy.errors import UsageError
from trtdeploy.onnxgraph.reading.source import SourceModel
from trtdeploy.runtimes.trial_inputs import RealInputs
from trtdeploy.tensors import DYNAMIC, Array, Profile, ShapeRange

_BATCHES = (1, 8, 32)
"""What a profile covers of an open batch, as where there are no samples."""


class InputSource(BaseModel):
    """Where real inputs come from.

    Attributes:
        data: ``digits``, a folder or archive of ``<split>/<class>/*.jpg``, or .npy / .npz files or a folder of them.
        fixed: ``NAME=FILE|VALUE`` for inputs that are the same in every run.
        preprocessing: How images become model input, for a model that does not say so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str | None = None
    fixed: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None


def read_inputs(wanted: InputSource, source: SourceModel, profiles: Sequence[Profile]) -> RealInputs | None:
    """Return one batch of real inputs, and the shapes of all samples; None where none are given.

    Args:
        wanted: Where they come from.
        source: The model.
        profiles: Of the build; the batch has the size and shape that the first one serves best, if there are such.

    Raises:
        UsageError: No sample lies in the first profile, or ``wanted`` does not suit the model.
        DataError: The samples cannot be read or do not fit the model.
    """
    fixed = parse_fixed(wanted.fixed, source.inputs)
    ranges = {name: ShapeRange(min=array.shape, opt=array.shape, max=array.shape) for name, array in fixed.items()}
    if wanted.data is None:
        return RealInputs(fixed, ranges, ", ".join(wanted.fixed)) if fixed else None
    if source.preprocessing is not None and wanted.preprocessing is not None:
        raise UsageError(f"{source.path} says itself how images become its input; leave --preprocessing out.")
    profile = profiles[0] if profiles else {}
    preprocessing = source.preprocessing or wanted.preprocessing
    with open_samples(wanted.data, source.inputs, preprocessing, fixed=fixed) as opened:
        groups = _by_shape(opened.samples)
        first = {shape: opened.samples.batch(indices[:1]) for shape, indices in groups.items()}
        chosen = _best_served(wanted.data, {shape: len(group) for shape, group in groups.items()}, first, profile)
        sampled = [name for name in first[chosen] if name not in fixed]
        rows = next((profile[name].opt[0] for name in sampled if name in profile), 1)
        group = groups[chosen]
        arrays = opened.samples.batch([group[number % len(group)] for number in range(rows)])
    for spec in source.inputs:
        if spec.name in sampled:
            batch_is_open = spec.shape[0] == DYNAMIC and not any(
                DYNAMIC in each.shape for each in source.inputs if each.name in fixed
            )
            batches = _BATCHES if batch_is_open else (rows,) * 3
            sizes = [each[spec.name].shape[1:] for each in first.values()]
            best = arrays[spec.name].shape[1:]
            low, high = (tuple(map(edge, zip(*sizes, strict=True))) for edge in (min, max))
            ranges[spec.name] = ShapeRange(
                min=(batches[0], *low), opt=(max(batches[1], 1), *best), max=(batches[2], *high)
            )
    origin = ", ".join([f"{rows} of {len(opened.samples.ids)} samples of {Path(wanted.data).name}", *wanted.fixed])
    return RealInputs(arrays, ranges, origin)


def _by_shape(samples: Samples) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for index in range(len(samples.ids)):
        groups.setdefault(samples.shape(index), []).append(index)
    return groups


def _best_served(
    data: str, counts: Mapping[Hashable, int], first: Mapping[Hashable, Mapping[str, Array]], profile: Profile
) -> Hashable:
    """Return the shape to measure: what the profile serves best, else the most frequent, the middle one of equals.

    Raises:
        UsageError: The profile covers no sample.
    """

    def agrees(arrays: Mapping[str, Array], *, exactly: bool) -> bool:
        return all(
            (array.shape[1:] == profile[name].opt[1:])
            if exactly
            else profile[name].contains((profile[name].opt[0], *array.shape[1:]))
            for name, array in arrays.items()
            if name in profile
        )

    covered = [shape for shape, arrays in first.items() if agrees(arrays, exactly=False)]
    if not covered:
        given = ", ".join(f"{name} {list(array.shape)}" for name, array in next(iter(first.values())).items())
        wanted = ", ".join(f"{name}={shapes}" for name, shapes in profile.items())
        raise UsageError(
            f"No sample of {data} lies in --shape {wanted}; one is {given}.", hint="Change --shape or --data."
        )
    best = [shape for shape in covered if agrees(first[shape], exactly=True)] or covered
    most = max(counts[shape] for shape in best)
    frequent = sorted(
        (shape for shape in best if counts[shape] == most),
        key=lambda shape: sum(array.size for array in first[shape].values()),
    )
    return frequent[len(frequent) // 2]
