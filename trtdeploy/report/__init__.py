"""The report that someone signs: one self-contained HTML file, and the same facts as JSON."""

from trtdeploy.report.content import Report, compose
from trtdeploy.report.page import render, write_report

__all__ = ["Report", "compose", "render", "write_report"]
