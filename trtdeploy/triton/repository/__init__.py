"""Triton's model repository: packaging plans, versions of a model, and exchanging them."""
