"""Rules of explicit INT8 on TensorRT, and what in a model breaks them."""

from trtdeploy.onnxgraph.lint.linter import lint
from trtdeploy.onnxgraph.lint.rules import RULES, Finding, Rule, rules_table

__all__ = ["RULES", "Finding", "Rule", "lint", "rules_table"]
