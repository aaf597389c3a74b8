"""Kernel counts: whether onnxruntime built as many kernels for integers as a folded graph promises."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from graphopt.backends.onnxruntime import weight_only
from graphopt.backends.onnxruntime.qlinear import QLINEAR, qlinear_op, reads_uint8
from graphopt.backends.onnxruntime.runner import OrtRunner
from graphopt.errors import LoweringError
from graphopt.ir.graph import Graph, Node
from graphopt.lowering.backend import Runner

INT8_KERNELS = {
    "linear_int8": ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm", "MatMulNBits", "QAttention"),
    "conv_int8": ("QLinearConv",),
    "add_int8": ("QLinearAdd",),
    **{op: (kernel,) for op, kernel in QLINEAR.items()},
}
"""The kernels that count as int8, by op."""

WEIGHT_ONLY_KERNELS = {"linear": "MatMulNBits", "embedding": "GatherBlockQuantized"}
"""By op, the kernel that reads its weight in integers."""


def require_kernels(folded: Graph, runner: Runner) -> None:
    """Raise LoweringError where the engine built fewer kernels for integers than `folded` promises."""
    built = _as_promised(Counter(runner.kernels()), folded, runner)
    promised = promised_int8(folded)
    for op, kernels in INT8_KERNELS.items():
        kinds = " and ".join(dict.fromkeys(site.kind for site in promised[op]))
        _require(built, kinds, kernels, promised[op])
    for op, kernel in WEIGHT_ONLY_KERNELS.items():
        sites = [site for site in folded.sites(op) if weight_only.why_not(site) is None]
        _require(built, f"weight-only {op}", (kernel,), sites)


def promised_int8(folded: Graph) -> Mapping[str, Sequence[Node]]:
    """The sites that are to have a kernel for integers, by op; matmuls with a float result share that of linears."""
    found: dict[str, list[Node]] = defaultdict(list)
    inside = [op for op in map(qlinear_op, folded.sites("quantize")) if op is not None]
    for site in [*folded.sites("linear_int8", "conv_int8", "add_int8"), *inside]:
        found[site.kind].append(site)
    found["linear_int8"] += [site for site in folded.sites("matmul") if reads_uint8(site) and site not in inside]
    return found


def _as_promised(built: Counter[str], folded: Graph, runner: Runner) -> Counter[str]:
    """Kernel counts by what was promised: one that computes several sites, or one of another op, counts as those."""
    built["QAttention"] *= 3  # it holds the projections of query, key and value
    if isinstance(runner, OrtRunner):
        merged = _split_parts(runner.model)
        merged.subtract(_own_split_parts(folded))
        products = convolutions_as_products(runner.model)
        built.update(merged)
        built["QGemm"] -= products
        built["QLinearConv"] += products
        built["GatherBlockQuantized"] += _gathers_of_integers(runner.model)
    return built


def _require(built: Mapping[str, int], what: str, kernels: Sequence[str], sites: Sequence[Node]) -> None:
    count = sum(built.get(kernel, 0) for kernel in kernels)
    if count < len(sites):
        raise LoweringError(
            f"{len(sites)} {what} were promised and onnxruntime built {count} kernels for integers "
            f"({', '.join(kernels)}) among {', '.join(site.label for site in sites)}"
        )


def _split_parts(model: ir.Model) -> Counter[str]:
    """How many results its Split nodes have beyond one each, by the kernel that they read: so many linears were merged
    into others."""
    parts: Counter[str] = Counter()
    for node in model.graph:
        source = node.inputs[0].producer() if node.op_type == "Split" and node.inputs[0] is not None else None
        if node.op_type == "Split":
            stored = source is not None and source.op_type == "MatMulNBits"
            parts["MatMulNBits" if stored else "MatMulIntegerToFloat"] += len(node.outputs) - 1
    return parts


def _own_split_parts(folded: Graph) -> Counter[str]:
    """The same of the nodes that a graph has before anything is merged."""
    parts: Counter[str] = Counter()
    for site in folded.sites("onnx.Split"):
        source = site.operands[0].producer if site.operands[0] is not None else None
        stored = source is not None and source.kind == "linear" and weight_only.why_not(source) is None
        parts["MatMulNBits" if stored else "MatMulIntegerToFloat"] += len(site.results) - 1
    return parts


def convolutions_as_products(model: ir.Model) -> int:
    """How many convolutions are products of matrices: their rows are pixels or windows, with channels moved last."""
    return sum(node.op_type == "QGemm" and _reads_pixels(node) and _makes_images(node) for node in model.graph)


def _reads_pixels(node: ir.Node) -> bool:
    reshape = node.inputs[0].producer() if node.inputs[0] is not None else None
    source = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
    transpose = source.producer() if source is not None else None
    while transpose is not None and transpose.op_type in ("Concat", "Slice", "Pad"):  # windows
        transpose = transpose.inputs[0].producer() if transpose.inputs[0] is not None else None
    if transpose is None or transpose.op_type != "Transpose":
        return False
    order = transpose.attributes["perm"].as_ints()
    return list(order) == [0, *range(2, len(order)), 1]


def _makes_images(node: ir.Node) -> bool:
    """Whether its rows become images, with channels moved to the front."""
    behind = [user for reshape in node.outputs[0].consumers() if reshape.op_type == "Reshape"
              for user in reshape.outputs[0].consumers()]  # fmt: skip
    orders = [list(user.attributes["perm"].as_ints()) for user in behind if user.op_type == "Transpose"]
    return any(order == [0, len(order) - 1, *range(1, len(order) - 1)] for order in orders)


def _gathers_of_integers(model: ir.Model) -> int:
    """How many Gathers read rows of stored integers, in the place of GatherBlockQuantized."""
    integers = (ir.DataType.INT8, ir.DataType.UINT8)
    tables = [node.inputs[0] for node in model.graph if node.op_type == "Gather"]
    return sum(one is not None and one.const_value is not None and one.const_value.dtype in integers for one in tables)
