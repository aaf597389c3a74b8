"""The GPU that graphs are lowered for, and what its compute capability allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FLOAT8, SPARSE_24 = (8, 9), (8, 0)
"""The first compute capability with products in float8, and with products that skip zeros in 2:4."""


@dataclass(frozen=True)
class Device:
    """A GPU, as far as lowering looks at it."""

    name: str
    capability: tuple[int, int]
    """Compute capability, such as (9, 0)."""
    memory: int
    """Bytes that are free."""

    @classmethod
    def here(cls) -> Device | None:
        """The current one, or None where torch can use none."""
        if torch.version.cuda is None or not torch.cuda.is_available():
            return None
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        return cls(found.name, (found.major, found.minor), torch.cuda.mem_get_info()[0])

    def __str__(self) -> str:
        return f"{self.name} (compute capability {'.'.join(map(str, self.capability))})"
