"""Libraries whose quantizers are put into a network."""
