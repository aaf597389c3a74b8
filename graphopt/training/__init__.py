"""Training of a graph at any point of a pipeline: batches in, an objective, the loop, and what is kept on disk.

It knows graphs and batches, and no passes: `graphopt.passes.recover` calls it.
"""
