"""Other servers of ONNX files, each in a virtual environment of its own, and what makes them answer from a bundle."""
