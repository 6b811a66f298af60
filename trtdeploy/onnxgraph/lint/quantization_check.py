"""The gate before a TensorRT build: explicit INT8 that TensorRT refuses, or takes and computes something else."""

from __future__ import annotations

import onnx

from trtdeploy.counting import counted
from trtdeploy.errors import QuantizationError
from trtdeploy.onnxgraph.lint.linter import errors
from trtdeploy.onnxgraph.lint.rules import Finding


def check_quantization(model: onnx.ModelProto) -> list[Finding]:
    """Return the linter's errors, in the order of the nodes; of a float model nothing.

    What the linter only warns of (slower or less accurate) is no reason not to build.
    """
    return errors(model)


def require_quantization(model: onnx.ModelProto) -> None:
    """Refuse a model that ``check_quantization`` finds fault with.

    Raises:
        QuantizationError: Lists every finding and what to do about them.
    """
    findings = check_quantization(model)
    if findings:
        remedies = dict.fromkeys(finding.remedy for finding in findings)
        raise QuantizationError(
            f"TensorRT would refuse this model's Q/DQ, or run something else ({counted(len(findings), 'finding')}):\n"
            + "\n".join(f"  {finding.node}: {finding.reason} [{finding.rule}]" for finding in findings),
            hint="\n".join(remedies),
        )
