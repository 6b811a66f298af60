"""Intervals, comparisons of two classifiers on the same samples, and distances between their outputs."""

from trtdeploy.statistics.distances import softmax_kl, sqnr_db
from trtdeploy.statistics.intervals import Interval, percentile, wilson_percent
from trtdeploy.statistics.paired import (
    NonInferiority,
    PairedDifference,
    compare_counts,
    compare_paired,
    mcnemar_exact_p,
    non_inferiority,
    samples_needed,
    tango_percent,
)

__all__ = [
    "Interval",
    "NonInferiority",
    "PairedDifference",
    "compare_counts",
    "compare_paired",
    "mcnemar_exact_p",
    "non_inferiority",
    "percentile",
    "samples_needed",
    "softmax_kl",
    "sqnr_db",
    "tango_percent",
    "wilson_percent",
]
