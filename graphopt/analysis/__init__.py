"""What can be told of a graph without changing it: how axes relate, what shrinks together, where errors arise."""
