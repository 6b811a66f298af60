"""Ranges without training: watched on data, fixed by a method, and the biases corrected afterwards."""
