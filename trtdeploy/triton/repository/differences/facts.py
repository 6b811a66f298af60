"""Facts about a model that its config carries as parameters, preprocessing and labels, and how those of two differ."""

from __future__ import annotations

import json
from typing import Any

from trtdeploy.onnxgraph.reading.source import LABELS_KEY, PREPROCESSING_KEY

_SHOWN = 3


def parameter(config: Any, key: str) -> str | None:
    """Return a parameter of a ``ModelConfig``; None where it has none of this name."""
    # a look-up in a protobuf map would add the key
    return str(config.parameters[key].string_value) if key in config.parameters else None


def preprocessing_difference(ours: Any, theirs: Any) -> str:
    """Say which fields of two configs' preprocessing differ, ``ours`` first; empty if none does."""
    return _difference(parameter(ours, PREPROCESSING_KEY), parameter(theirs, PREPROCESSING_KEY))


def label_difference(ours: Any, theirs: Any) -> str:
    """Say where the labels of two configs differ, ``ours`` first; empty if they do not."""
    return _difference(parameter(ours, LABELS_KEY), parameter(theirs, LABELS_KEY))


def _difference(ours: str | None, theirs: str | None) -> str:
    if ours == theirs:
        return ""
    if ours is None or theirs is None:
        return "there are none here" if ours is None else "there are none there"
    try:
        here, there = json.loads(ours), json.loads(theirs)
    except ValueError:
        return "they cannot be read"
    if type(here) is not type(there) or not isinstance(here, (dict, list)):
        return "they cannot be read"
    if isinstance(here, list) and len(here) != len(there):
        return f"{len(here)} instead of {len(there)}"
    mine, other = _by_name(here), _by_name(there)
    names = [name for name in {**mine, **other} if mine.get(name) != other.get(name)]
    shown = [f"{name} is {json.dumps(mine.get(name))} instead of {json.dumps(other.get(name))}" for name in names]
    more = [f"and {len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else []
    return ", ".join([*shown[:_SHOWN], *more])


def _by_name(facts: dict[str, Any] | list[Any]) -> dict[str, Any]:
    return facts if isinstance(facts, dict) else {f"number {index}": value for index, value in enumerate(facts)}
