"""One adapter a framework: each shows its native graph through the narrow waist of graphopt.graph."""
