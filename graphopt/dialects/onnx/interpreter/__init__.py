"""ONNX in PyTorch: a module that computes an `OnnxGraph` with functions of torch, to trace it with.

`module` runs the nodes; a node is an op, whose torch form is in `canonical`, or an operator of ONNX, whose form is in
the file of its family: `elementwise`, `reductions`, `movement`, `windows`, `normalization`, `contrib`.
Sizes that a graph computes from shapes are Python numbers (`sizes`), so that dynamic axes stay dynamic in a trace.
"""
