"""Whether a plan has a label for every class that it scores."""

from __future__ import annotations

from trtdeploy.plan import Manifest
from trtdeploy.tensors import DYNAMIC


def unmatched_labels(manifest: Manifest) -> tuple[int, int] | None:
    """Return how many classes a classifier scores and how many labels it has, where these numbers differ.

    A classifier has one output with one row of scores, whose length is known. Labels of anything else, of boxes or
    images, are not one per element, and are not counted.
    """
    if manifest.labels is None or len(manifest.outputs) != 1:
        return None
    shape = manifest.outputs[0].shape
    row = [size for size in shape[1:] if size != 1] or [1]
    if len(shape) < 2 or len(row) > 1 or DYNAMIC in row or row[0] == len(manifest.labels):
        return None
    return row[0], len(manifest.labels)
