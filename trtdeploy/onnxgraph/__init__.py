"""Reading and rewriting ONNX graphs: inputs and outputs, metadata, Q/DQ pairs."""
