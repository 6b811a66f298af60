"""A classifier that answers NaN on images, and numbers on the random inputs of a build."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper, numpy_helper


def nan_on_images(before: str, after: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Return nodes from ``before`` to ``after``, and their constants.

    They divide 0 by 0 where the first two pixels of ``input`` are alike, as they are on the digits.
    """
    steps: Iterable[tuple[str, list[str], str, dict[str, int]]] = (
        ("Gather", ["input", "first"], "plane", {"axis": 1}),
        ("Gather", ["plane", "first"], "row", {"axis": 1}),
        ("Gather", ["row", "left"], "one", {"axis": 1}),
        ("Gather", ["row", "right"], "other", {"axis": 1}),
        ("Sub", ["one", "other"], "slope", {}),
        ("Mul", [before, "slope"], "sloped", {}),
        ("Div", ["sloped", "slope"], after, {}),
    )
    nodes = [helper.make_node(op, reads, [made], **axis) for op, reads, made, axis in steps]
    indices: dict[str, int | list[int]] = {"first": 0, "left": [0], "right": [1]}
    return nodes, [numpy_helper.from_array(np.array(value), name) for name, value in indices.items()]
