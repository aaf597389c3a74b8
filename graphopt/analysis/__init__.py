"""What can be told of a graph without changing it: groups of axes that shrink together, padding, error propagation."""
