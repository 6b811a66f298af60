"""Signing off a classifier where it runs: accuracy, agreement, latency and throughput, with gates.

The same checks apply to a served model (``trtdeploy.triton.targets.served_classifier``) and to a plan in this process.
"""

from trtdeploy.validation.examination import Examination, examine, validate
from trtdeploy.validation.options import Gate, ValidationOptions, ValidationReport
from trtdeploy.validation.send_split import Answers, ask
from trtdeploy.validation.target import PlanTarget, ServerTimes, ServerTotals, Target

__all__ = [
    "Answers",
    "Examination",
    "Gate",
    "PlanTarget",
    "ServerTimes",
    "ServerTotals",
    "Target",
    "ValidationOptions",
    "ValidationReport",
    "ask",
    "examine",
    "validate",
]
