"""A known sample: an input and what the plan answered to it, kept beside a version as ``sample.npz``."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trtdeploy.errors import RepositoryError
from trtdeploy.plan import Manifest
from trtdeploy.tensors import DYNAMIC, Array

SAMPLE_FILE = "sample.npz"
# An engine for another GPU, or with other batches formed, adds in another order; an other model is far outside.
_TOLERANCE = 0.01


def default_sample(manifest: Manifest) -> dict[str, Array]:
    """Return one input of the smallest shape that the plan takes: normal noise, the same every time."""
    rng = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for spec in manifest.inputs:
        profile = manifest.profiles[0] if manifest.profiles else {}
        smallest = profile[spec.name].min if spec.name in profile else None
        shape = smallest or tuple(1 if size == DYNAMIC else size for size in spec.shape)
        if np.dtype(spec.dtype).kind == "f":
            inputs[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        else:  # an index that any table has
            inputs[spec.name] = np.zeros(shape, spec.dtype)
    return inputs


def record_sample(plan: Path, inputs: Mapping[str, Array]) -> bytes:
    """Run a plan here and return the pair as a file's content.

    Raises:
        TrtDeployError: The plan does not run here, or refuses the input.
    """
    from trtdeploy.engine import Engine

    with Engine.load(plan) as engine:
        outputs = engine.infer(dict(inputs))
    buffer = io.BytesIO()
    arrays = {f"input:{name}": array for name, array in inputs.items()}
    arrays |= {f"output:{name}": np.asarray(array) for name, array in outputs.items()}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read_sample(version: Path) -> tuple[dict[str, Array], dict[str, Array]] | None:
    """Return the inputs and outputs that lie beside a version; None if there are none.

    Raises:
        RepositoryError: The file is damaged.
    """
    path = version / SAMPLE_FILE
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pairs = [(name.partition(":"), arrays[name]) for name in arrays]
    except Exception as error:  # numpy and zipfile raise a dozen kinds on damaged bytes
        raise RepositoryError(f"{path} is damaged: {error}.", hint="Publish this plan again.") from error
    inputs = {name: array for (kind, _, name), array in pairs if kind == "input"}
    return inputs, {name: array for (kind, _, name), array in pairs if kind == "output"}


def difference(expected: Mapping[str, Array], answer: Mapping[str, Array]) -> str:
    """Return in words how an answer differs from the recorded one; empty if it does not."""
    for name, array in expected.items():
        given = answer.get(name)
        if given is None or given.shape != array.shape:
            return f"{name} has the shape {None if given is None else list(given.shape)}, not {list(array.shape)}"
        ours, theirs = array.astype(np.float64), given.astype(np.float64)
        limit = _TOLERANCE * max(float(np.abs(ours).max(initial=0.0)), 1e-6)
        worst = float(np.abs(ours - theirs).max(initial=0.0))
        if not worst <= limit:
            return f"{name} is off by {worst:.4g}; {limit:.4g} is allowed"
    return ""
