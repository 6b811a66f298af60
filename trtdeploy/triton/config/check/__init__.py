"""Triton's rules for ``config.pbtxt``, checked without a server.

The rules are those of ``ValidateModelConfig``, ``ValidateModelIOConfig``, ``ValidateInstanceGroup`` and the checks of
sequences and ensembles in ``model_config_utils.cc`` of github.com/triton-inference-server/core, of its warm-up and
label files, and what a model meets only when requests come: a batch or a shape that the plan's profiles do not cover.
"""

from trtdeploy.triton.config.check.checker import check_config
from trtdeploy.triton.config.check.finding import Finding, Severity

__all__ = ["Finding", "Severity", "check_config"]
