"""What `sparsify` is made of: which weights go to zero, how many in each, and what that is worth."""
