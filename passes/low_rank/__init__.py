"""The pass `low-rank` and its parts: linears and convs are split in two."""

from graphopt.passes.low_rank.low_rank import LowRank

__all__ = ["LowRank"]
