"""Paired timing, what machine this is, and the cache of what was timed."""
