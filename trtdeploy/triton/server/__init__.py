"""A tritonserver on this machine: finding, starting and stopping it."""
