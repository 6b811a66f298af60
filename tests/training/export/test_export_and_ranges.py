"""A real export and a file of dynamic ranges with the same scales lead to the same model."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from training.checkpoints.checkpoint import load_checkpoint
from training.onnx_export import INPUT_NAME, export_checkpoint, onnx_predictor
from training.quantization import SMALLEST_AMAX
from trtdeploy.onnxgraph.lint.quantization_check import check_quantization
from trtdeploy.onnxgraph.qdq import int8_scales
from trtdeploy.onnxgraph.qdq.dynamic_ranges import read_ranges, write_ranges
from trtdeploy.onnxgraph.qdq.ranges_to_qdq import canonical_qdq, quantize_with_ranges, ranges_of, without_qdq


@pytest.mark.parametrize("name", ["ranges.json", "calibration.cache"])
def test_ranges_from_a_file_and_the_explicit_export_are_one_model(digits, ptq_file, tmp_path, name):
    checkpoint = load_checkpoint(ptq_file)
    checkpoint.model._pooled_quantizer.disable()  # ranges become Q/DQ at weighted layers only
    exported = export_checkpoint(checkpoint, tmp_path / "ptq.onnx", digits)
    explicit = onnx.load(exported.path)
    write_ranges(ranges_of(explicit), tmp_path / name)
    canonical = canonical_qdq(explicit)
    from_ranges = quantize_with_ranges(without_qdq(explicit), read_ranges(tmp_path / name))
    assert from_ranges == canonical
    assert check_quantization(canonical) == []
    onnx.checker.check_model(canonical, full_check=True)
    preprocessing = load_checkpoint(ptq_file).facts.preprocessing
    inputs = preprocessing.normalise(digits.split("test").pixels(preprocessing, range(50)))
    answers = [onnx_predictor(model.SerializeToString())(inputs) for model in (explicit, canonical, from_ranges)]
    np.testing.assert_array_equal(answers[1], answers[2])
    np.testing.assert_array_equal(answers[0], answers[1])
    # ONNX Runtime's optimizer fuses what it finds, and that differs from the export's own form
    fused = [
        onnxruntime.InferenceSession(model.SerializeToString()).run(None, {INPUT_NAME: inputs})[0]
        for model in (canonical, from_ranges)
    ]
    np.testing.assert_array_equal(*fused)


def test_dead_channels_have_one_rule():
    assert np.float32(SMALLEST_AMAX) == int8_scales.SMALLEST_AMAX
