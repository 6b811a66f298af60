"""Differences between a plan, its deployed version and what a server serves."""
