"""From an ONNX file to a plan, here or in a child process; and what files of a build say of themselves."""
