"""What a machine's engines reach at best: multiply-adds by precision, and bytes of memory a second.

A result can be no faster than these allow: its products take at least their multiply-adds over the first, and its
weights at least their bytes over the second (the roofline model; Williams et al., 2009).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from graphopt.measure import cache, machine
from graphopt.measure.timing import Clock

SIZE = 1024
"""Rows, columns and depth of the product that is timed: large enough for any engine, a few ms in float32."""

COPIED = 2**26
"""Bytes of a copy that is timed: beyond the caches."""

SECONDS = 0.45
"""For each of four figures: two seconds together."""


@dataclass(frozen=True)
class Limits:
    """What was measured, on the threads that torch uses."""

    macs: dict[str, float]
    """By precision (float32, bfloat16, int8), multiply-adds a second; those that torch has kernels for."""
    bandwidth: float
    """Bytes a second that a copy reads and writes together."""
    threads: int


def measured(clock: Clock = time.perf_counter, kept: cache.Timings | None = None) -> Limits:
    """The limits of this machine, measured in two seconds by the products of torch's engines, and cached."""
    timings = cache.opened() if kept is None else kept
    found = known(timings)
    if found is None:
        found = Limits(
            {name: SIZE**3 * rate(product, clock) for name, product in _products().items()},
            2 * COPIED * rate(_copy(), clock),
            torch.get_num_threads(),
        )
        best = max(found.macs, key=found.macs.__getitem__)
        timings.put(_key(), {"form": best, "ratios": {}, "dropped": {}, "limits": asdict(found)})
    return found


def known(kept: cache.Timings | None = None) -> Limits | None:
    """The limits, where they were measured before."""
    timings = cache.opened() if kept is None else kept
    found = timings.get(_key())
    return None if found is None else Limits(**found["limits"])


def _key() -> dict[str, Any]:
    return {
        "choice": "limits", "engine": f"torch {torch.__version__}", "machine": machine.machine(),
        "threads": torch.get_num_threads(), "shapes": [[[SIZE, SIZE], [SIZE, SIZE]]], "int8": "oneDNN",
    }  # fmt: skip


def rate(call: Callable[[], object], clock: Clock) -> float:
    """Calls a second, by the fastest of as many as fit into SECONDS, after one to warm up."""
    call()
    begun, fastest = clock(), float("inf")
    while clock() - begun < SECONDS:
        start = clock()
        call()
        fastest = min(fastest, clock() - start)
    return 1 / fastest


def _products() -> dict[str, Callable[[], object]]:
    """A square product in each precision; that of int8 by oneDNN, which has kernels for CPUs without VNNI too."""
    x = torch.ones(SIZE, SIZE)
    short = x.bfloat16()
    products: dict[str, Callable[[], Any]] = {"float32": lambda: x @ x, "bfloat16": lambda: short @ short}
    onednn: Any = torch.ops.onednn
    if hasattr(onednn, "qlinear_prepack"):
        whole = x.to(torch.uint8)
        weight = onednn.qlinear_prepack(x.to(torch.int8), None), torch.ones(SIZE), torch.zeros(SIZE, dtype=torch.int64)
        rest: Any = (None, 1.0, 0, torch.float32, "none", [], "")
        products["int8"] = lambda: onednn.qlinear_pointwise(whole, 1.0, 0, *weight, *rest)
    return products


def _copy() -> Callable[[], object]:
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def line(found: Limits | None) -> str:
    """What a user reads of the limits; None is not measured."""
    if found is None:
        return "this machine: not measured, as GRAPHOPT_MEASURE=0"
    products = ", ".join(f"{name} {macs / 1e9:.0f}" for name, macs in found.macs.items())
    return f"this machine, {found.threads} threads: {products} GMAC/s, memory {found.bandwidth / 1e9:.1f} GB/s"
