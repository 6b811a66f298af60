"""The training loop: epochs, schedule, batches, processes, and going on after an interruption."""
