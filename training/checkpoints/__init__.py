"""Checkpoints: own ones, which carry labels, preprocessing and calibration, and other programs'."""
