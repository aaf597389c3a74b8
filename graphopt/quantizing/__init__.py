"""What `quantize`, `smooth` and `fold-int8` are made of: schemes, ranges, rounding, islands, mixed precision."""
