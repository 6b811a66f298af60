"""Quantization-aware training: ranges and weights trained together, from a teacher too."""
