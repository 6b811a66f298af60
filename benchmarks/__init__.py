"""Measurements, each a command: ``python -m benchmarks.<name>``. They compare side by side, in one run."""
