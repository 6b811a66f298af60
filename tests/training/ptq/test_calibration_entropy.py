from __future__ import annotations

import numpy as np
import pytest
from pytorch_quantization.calib.histogram import _compute_amax_entropy

from trtdeploy.calibration.entropy import entropy_bin

RNG = np.random.default_rng(0)
STRIDED = np.zeros(512, np.int64)
STRIDED[::4] = RNG.integers(1, 9, 128)
CASES = {
    "half-normal": np.histogram(np.abs(RNG.normal(size=9999)), bins=600)[0],
    "outlier": np.histogram(np.append(np.abs(RNG.normal(size=9999)), 40), bins=600)[0],
    "strided": STRIDED,
    "periodic": np.tile([5, 1, 3, 0], 128),
    "uniform": np.full(400, 7),
    "one bin": np.eye(1, 400, 300, dtype=np.int64)[0],
    "zeros": np.eye(1, 400, 0, dtype=np.int64)[0],
    "sparse": (RNG.random(500) < 0.02) * RNG.integers(1, 99, 500),
    "smallest": np.arange(128),
}


@pytest.mark.parametrize("case", CASES)
def test_the_bin_is_that_of_pytorch_quantization(case: str) -> None:
    counts = CASES[case].astype(np.int64)
    edges = np.arange(counts.size + 1.0)
    before = counts.copy()
    found = entropy_bin(counts)
    assert np.array_equal(counts, before)
    assert found == _compute_amax_entropy(counts.copy(), edges, 8, False).item()
