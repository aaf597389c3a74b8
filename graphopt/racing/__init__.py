"""One model on several engines: each result is timed in a process of its own, and the fastest is taken."""
