"""An ONNX file read into one form, whatever exporter has written it."""
