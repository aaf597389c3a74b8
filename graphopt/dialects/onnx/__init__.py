"""The graph over onnx-ir, and the ONNX files that it is read from and written to."""
