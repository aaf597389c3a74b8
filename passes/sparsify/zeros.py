"""What zeros in weights bring: how many there are, how far they compress, and whether the target skips them."""

from __future__ import annotations

from torch import Tensor

from graphopt.numerics.sparsity import compressed_share
from graphopt.pipeline.target import Target


class Zeros:
    """Counts over all weights of one pass, before and after."""

    def __init__(self) -> None:
        self.weights = self.elements = self.zeros = self.bytes = 0
        self.compressed_before = self.compressed_after = 0.0
        """Bytes, estimated from samples."""

    def add(self, before: Tensor, after: Tensor) -> None:
        self.weights += 1
        self.elements += after.numel()
        self.zeros += int((after == 0).sum())
        self.bytes += after.nbytes
        self.compressed_before += compressed_share(before) * before.nbytes
        self.compressed_after += compressed_share(after) * after.nbytes

    def notes(self, target: Target, pattern: str) -> list[str]:
        """Notes for the user: how many zeros, in how many bytes, and whether the target has kernels that skip them."""
        if not self.weights:
            return []
        found = [
            f"{self.zeros / max(self.elements, 1):.1%} of {self.weights} weights ({_size(self.bytes)}) are zero; "
            f"compressed they take about {_size(self.compressed_after)}, and took {_size(self.compressed_before)} "
            "(zlib, from samples)"
        ]
        if not target.zeros:
            found.append("zeros bring speed only where kernels skip them; name a target to hear about its kernels")
        elif pattern in target.sparse:
            found.append(f"{target.name}: {target.zeros}")
        else:
            has = f"has kernels for {', '.join(target.sparse)} only" if target.sparse else "has no kernel for zeros"
            found.append(
                f"warning: {pattern} zeros make nothing faster on {target.name}, which {has} ({target.zeros}); to gain "
                "speed, use low-rank or quantize, or remove whole channels, heads and neurons"
            )
        return found


def _size(count: float) -> str:
    power = sum(count >= 1000**power for power in (1, 2, 3))
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB')[power]}"
