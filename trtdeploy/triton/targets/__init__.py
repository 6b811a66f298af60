"""Served models as targets of validation."""
