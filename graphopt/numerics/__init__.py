"""The mathematics of shrinking: tensors in, tensors out, no graph.

quantize: integers and scales. reconstruct: rounding by GPTQ, and biases. smooth: outliers into weights. factor:
low rank. prune: which weights go to zero. fold: batch norm into a weight. observe: ranges over batches. moments: what
inputs carry. metrics: how far two tensors are apart. finite: the check that all of them share.
"""
