"""A package that adds a pass and a target to graphopt."""
