"""A served pipeline that takes image files and names the best classes, as a target of validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trtdeploy.data.dataset import Split
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import ServerError, UsageError
from trtdeploy.tensors import BYTES, DYNAMIC, Array
from trtdeploy.triton.client import Reply, ServedModel
from trtdeploy.triton.targets.served_classifier import Client, ServedTarget, check_classifier

# The least share of all classes that are not named. Where the named ones come to nearly 1 the true share is smaller,
# but then it would be the rounding of single precision that is seen.
_LEAST_REST = 1e-4


class EncodedTarget(ServedTarget):
    """A pipeline on a Triton server that takes image files: BYTES, or UINT8 padded with zeros to the longest.

    It answers with class names and their probabilities, best first, or with scores of all classes. Named classes become
    a row of scores over all of them: the logarithm of the probability, and for the classes that are not named that of
    an equal share of the rest.

    Raises:
        ServerError: The server does not answer, or has no such model.
        UsageError: It is no such pipeline, or does not know its class names.
    """

    takes_files = True

    def __init__(self, client: Client, model: ServedModel, version: str = "") -> None:
        names = [spec for spec in model.outputs if spec.dtype == BYTES]
        numbers = [spec for spec in model.outputs if spec.dtype.startswith("float")]
        if len(model.inputs) != 1 or len(model.outputs) != len(names) + 1 or len(numbers) != 1 or len(names) > 1:
            raise UsageError(
                f"{model.name} answers {', '.join(map(str, model.outputs))} to {', '.join(map(str, model.inputs))}.",
                hint="A pipeline takes image files, and answers class names with probabilities, or scores.",
            )
        steps = [client.describe(step) for step in model.steps]
        known = replace(
            model,
            labels=next((each.labels for each in (model, *reversed(steps)) if each.labels is not None), None),
            preprocessing=next((each.preprocessing for each in (model, *steps) if each.preprocessing), None),
            outputs=(*numbers, *names),
        )
        super().__init__(client, known, version)
        self._probabilities, self._names = numbers[0].name, names[0].name if names else None
        if self._names is not None:
            if known.labels is None:
                raise UsageError(
                    f"Neither {model.name} nor a model that it runs says what its classes are.",
                    hint='Give one of them the parameter "trtdeploy.labels" in its config.',
                )
            self._index = {label.encode(): position for position, label in enumerate(known.labels)}
            self.score_count = len(known.labels)  # the classes that are not named get the rest
            self.top_k = names[0].shape[-1] if names[0].shape[-1] != DYNAMIC else None

    def prepare(self, split: Split, preprocessing: Preprocessing | None, indices: Sequence[int]) -> Array:
        files = [split.file(int(index)) for index in indices]
        if self.input.dtype == BYTES:
            batch: Array = np.empty(len(files), object)
            batch[:] = files
            return batch.reshape(-1, *self.sample_shape(preprocessing))
        padded = np.zeros((len(files), max(map(len, files))), np.uint8)
        for row, content in zip(padded, files, strict=True):
            row[: len(content)] = np.frombuffer(content, np.uint8)
        return padded

    def sample_shape(self, preprocessing: Preprocessing | None) -> tuple[int, ...]:
        return tuple(1 if self.input.dtype == BYTES else DYNAMIC for _ in self.input.shape[1:])

    def _scores_of(self, reply: Reply) -> Array:
        given = reply.outputs[self._probabilities]
        if self._names is None:
            return given
        names = reply.outputs[self._names]
        if names.shape != given.shape or names.ndim != 2:
            raise ServerError(
                f"{self.name} answered names of shape {list(names.shape)} and probabilities of {list(given.shape)}."
            )
        return _spread_out(given, self._positions(names), len(self._index))

    def _positions(self, names: Array) -> Any:
        try:
            return np.array([[self._index[_as_bytes(name)] for name in row] for row in names], np.int64)
        except KeyError as error:
            raise ServerError(
                f"{self.name} answered the class {error.args[0].decode(errors='replace')!r}, "
                f"which is none of its {len(self._index)} labels."
            ) from None


def served_target(client: Client, model: str, version: str = "") -> ServedTarget:
    """Return the target for a served model: of tensors, or of image files if it takes those.

    Args:
        client: The connection.
        model: Model name.
        version: Version to ask; if empty, the server chooses for every request, as it does for most clients.

    Raises:
        ServerError: The server does not answer, or has no such model.
        UsageError: The model is no classifier.
    """
    described = client.describe(model, version)
    files = len(described.inputs) == 1 and (
        described.inputs[0].dtype == BYTES
        or (described.inputs[0].dtype == "uint8" and len(described.inputs[0].shape) <= 2)
    )
    if files:
        return EncodedTarget(client, described, version)
    check_classifier(described)
    return ServedTarget(client, described, version)


def _as_bytes(name: bytes | str) -> bytes:
    return name.encode() if isinstance(name, str) else name


def _spread_out(probabilities: Array, positions: Any, classes: int) -> Array:
    """Return a row of scores over all classes for each row of named ones."""
    named = probabilities.astype(np.float64)
    if not np.isfinite(named).all():
        return np.full((len(named), classes), np.nan)
    if (named < 0).any() or (named.sum(axis=1) > 1 + 1e-3).any():  # no probabilities: scores of another kind
        scores = np.repeat(named.min(axis=1, keepdims=True) - 1, classes, axis=1)
    else:
        smallest = np.maximum(named.min(axis=1, keepdims=True), 1e-30)
        rest = np.maximum(1 - named.sum(axis=1, keepdims=True), _LEAST_REST) / max(1, classes - named.shape[1])
        scores = np.repeat(np.log(np.minimum(rest, smallest)), classes, axis=1)
        named = np.log(np.maximum(named, 1e-30))
    np.put_along_axis(scores, positions, named, axis=1)
    return scores.astype(np.float32)
