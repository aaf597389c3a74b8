"""What `low-rank` is made of: which sites can be pairs, and their ranks."""
