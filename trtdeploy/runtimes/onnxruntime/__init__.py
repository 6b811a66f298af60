"""ONNX Runtime on the CPU: offline optimization, measured tactics, execution."""
