"""How near a result comes to what the machine can do: the roofline model, by class of kernels.

A product takes at least its multiply-adds over the rate of its class, and at least the bytes of its weights over the
memory's bandwidth (Williams et al., 2009). What a run takes beyond that is other operators, activations that leave the
caches, and products below the machine's rate.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from graphopt.ir.cost import flops, nbytes, sizes
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.qdq.regions import reads_integers
from graphopt.measure.limits import Limits

_INT8 = ("linear_int8", "conv_int8")


def least_seconds(
    folded: Graph, feeds: Mapping[str, Tensor], limits: Limits, precision: str = "float32"
) -> dict[str, float]:
    """By class of products (int8, or the precision of floats), the least seconds of one run on this machine.

    folded: the graph in ops, before it is lowered. Products of a class whose rate is not known count at that of
    float32; those whose sizes are not known are left out.
    """
    numbers = sizes(folded, feeds)
    found: dict[str, float] = {}
    for node in folded.nodes:
        count = flops(node, numbers)
        if count:
            kind = "int8" if _is_int8(node) else precision
            stored = sum(nbytes(value, numbers) for value in map(_stored, node.operands) if value is not None)
            rate = limits.macs.get(kind, limits.macs["float32"])
            found[kind] = found.get(kind, 0.0) + max(count / 2 / rate, stored / limits.bandwidth)
    return found


def _is_int8(node: Node) -> bool:
    return node.kind in _INT8 or (node.kind in ("linear", "conv", "matmul") and reads_integers(node))


def _stored(value: Value | None) -> Value | None:
    """The constant that an operand is, or is dequantized from."""
    if value is not None and value.producer is not None and value.producer.kind == "dequantize":
        value = value.producer.operand("x")
    return value if value is not None and value.is_constant else None
