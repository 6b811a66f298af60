"""Devices, streams, memory and graphs of CUDA, over cuda-python. Importing it calls nothing."""
