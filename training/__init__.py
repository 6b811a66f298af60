"""Make INT8 checkpoints (PTQ, QAT) with pytorch-quantization and export them to Q/DQ ONNX. Torch lives only here."""
