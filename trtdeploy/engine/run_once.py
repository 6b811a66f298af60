"""Running a plan once on files or random numbers."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trtdeploy.data.stores import IMAGE_SUFFIXES
from trtdeploy.engine import Engine
from trtdeploy.errors import DataError, InputNameError, UsageError
from trtdeploy.files import atomic_write, keep_inputs
from trtdeploy.plan import Manifest, manifest_path
from trtdeploy.tensors import Array, TensorSpec, random_inputs, split_assignment

_TOP = 3


def run_once(
    plan: str | Path, inputs: Sequence[str], *, output: Path | None = None, threads: int | None = None
) -> tuple[dict[str, Array], Manifest]:
    """Run a plan once.

    Args:
        plan: The plan.
        inputs: ``NAME=FILE.npy``, ``NAME=random`` or ``NAME=IMAGE`` for each input.
        output: Where to write the outputs, as .npz.
        threads: Threads of one inference, on a CPU.

    Raises:
        UsageError: An input has another form, an image is given to a plan that knows no preprocessing, or the output
            would replace the plan or an input.
        DataError: A file cannot be read.
        InputError: The plan does not accept an input.
        PlanError: The plan cannot be loaded.
    """
    if output is not None:
        keep_inputs(output, plan, manifest_path(plan), *_possible_files(inputs))
    with Engine.load(plan, threads=threads) as engine:
        specs = {spec.name: spec for spec in engine.inputs}
        arrays: dict[str, Array] = {}
        for text in inputs:
            name, array = _read_input(text, specs, engine.manifest)
            if name in arrays:
                raise UsageError(f"--input names {name!r} twice; give each input once.")
            arrays[name] = array
        outputs = engine.infer(arrays)
        if output is not None:
            atomic_write(output, _npz(outputs))
        return outputs, engine.manifest


def _possible_files(inputs: Sequence[str]) -> list[str]:
    """Return all that may be a file in ``NAME=FILE``, as long as the names are not known."""
    return [text[place + 1 :] for text in inputs for place, sign in enumerate(text) if sign == "="]


def summarize(outputs: Mapping[str, Array], manifest: Manifest) -> dict[str, Any]:
    """Return what people look at first in outputs: shape, range and, for a classifier, the likeliest labels."""
    facts: dict[str, Any] = {}
    for name, array in outputs.items():
        facts[name] = {
            "dtype": array.dtype.name,
            "shape": list(array.shape),
            "min": float(array.min()),
            "max": float(array.max()),
        }
        if manifest.labels is not None and array.ndim == 2 and array.shape[1] == len(manifest.labels):
            facts[name]["top"] = [_likeliest(row, manifest.labels) for row in array]
    return facts


def _npz(arrays: Mapping[str, Array]) -> bytes:
    """Return an .npz file; ``numpy.savez`` cannot write an array that is called "file"."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.save(member, array, allow_pickle=False)
    return buffer.getvalue()


def _likeliest(scores: Array, labels: Sequence[str]) -> list[dict[str, Any]]:
    scores = scores.astype(np.float64)
    shifted = np.exp(scores - scores.max())
    probabilities = shifted / shifted.sum()
    return [
        {"label": labels[index], "probability": float(probabilities[index])}
        for index in np.argsort(-scores, kind="stable")[:_TOP]
    ]


def _read_input(text: str, specs: Mapping[str, TensorSpec], manifest: Manifest) -> tuple[str, Array]:
    name, source = split_assignment(text, specs)
    if not source:
        raise UsageError(
            f"--input {text!r} is not NAME=FILE.npy, NAME=random or NAME=IMAGE.",
            hint=f"The inputs of this plan: {', '.join(map(str, specs.values()))}.",
        )
    if name not in specs:
        raise InputNameError(f"--input names {name!r}; this plan takes {sorted(specs)}.")
    if source == "random":
        values = {key: held.opt for profile in manifest.profile_values[:1] for key, held in profile.items()}
        return name, random_inputs([specs[name]], manifest.best_served, values=values)[name]
    path = Path(source)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        if manifest.preprocessing is None:
            raise UsageError(
                f"The plan knows no preprocessing, so {path} cannot become input {name!r}; give a .npy file."
            )
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}.") from error
        return name, manifest.preprocessing([content])
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python, and raises whatever that raises
        raise DataError(f"{path} is not a .npy file that can be read: {error}.") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} holds several arrays; give a .npy file with one.")
    return name, array
