"""ONNX models that run as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_graphs import as_exported

from trtdeploy.errors import InferenceError, ModelError, UsageError
from trtdeploy.onnxgraph.name_patterns import require_matches
from trtdeploy.runtimes.onnxruntime.direct import direct_runner


def test_the_outputs_that_were_asked_for_and_errors_that_name_the_model(qdq_onnx: Path) -> None:
    content = qdq_onnx.read_bytes()
    output = onnx.load(qdq_onnx).graph.output[0].name
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    run = direct_runner(content, [output], name="m.onnx")
    answers = run({"input": images})
    assert len(answers) == 1
    np.testing.assert_allclose(answers[0], as_exported(qdq_onnx, {"input": images})[0], rtol=0.05, atol=0.2)
    with pytest.raises(InferenceError, match=r"failed on m\.onnx"):
        run({"input": images[:, :1]})
    with pytest.raises(ModelError, match=r"does not accept m\.onnx"):
        direct_runner(b"no model", [output], name="m.onnx")


def test_a_pattern_that_matches_nothing_is_refused_with_near_names() -> None:
    require_matches(["blocks.*", "head"], ["blocks.0.conv", "head"], kind="layer")
    with pytest.raises(UsageError, match=r"--skip hed matches no layer\. Near names: head"):
        require_matches(["hed"], ["blocks.0.conv", "head"], kind="layer")
    with pytest.raises(UsageError, match="Head matches no layer"):  # case counts
        require_matches(["Head"], ["head"], kind="layer")
