"""What `prune` is made of: which groups, how many of their units, which of them, and what makes up for those."""
