"""TensorFlow: a graph as a SavedModel. `target` is the target, `translation` makes the function, `saved_model` writes
and reads it; how TensorFlow computes each op is in `canonical`, and each further operator of ONNX in `operators`.

Importing these modules does not import tensorflow, so each form takes it as its first argument.
"""
