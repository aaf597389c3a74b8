"""An `FxGraph` as an AOTInductor package: compiled here, and run by plain PyTorch, without graphopt.

The graph that is compiled has quantize and dequantize around float ops. Inductor's freezing makes one oneDNN kernel of
`dequantize -> linear or conv -> post-op [-> quantize]` and keeps only the packed weight. For that it needs scales of
activations as numbers, weights dequantized per channel, and no custom operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from graphopt.dialects.fx import custom_operators
from graphopt.dialects.fx.archive import to_program
from graphopt.dialects.fx.native import Native, meta, module_path
from graphopt.dialects.fx.spellings import arguments, quantized_decomposed
from graphopt.dialects.silence import quiet
from graphopt.errors import GraphError, LoweringError, first_line
from graphopt.ir.graph import Graph
from graphopt.ir.ops import OPS
from graphopt.ir.ops.recurrent import RECURRENT
from graphopt.ir.qdq.integer_forms import unfold
from graphopt.ir.structure import Output

INT8_KERNELS = ("onednn.qlinear_pointwise", "onednn.qconv2d_pointwise", "onednn.qconv_pointwise")
"""The operators that inductor makes of a quantized linear or conv, by the beginning of their names."""


def compile_package(graph: Any, path: Path, feeds: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, int]:
    """Write a package that `torch._inductor.aoti_load_package` runs.

    graph: an FxGraph of ops. feeds: an example, for the compiler. The package takes inputs by keyword and returns what
    the model returned, with a dict for any mapping, and without entries that are numbers or None. Returns how many
    kernels of each name inductor made.
    Raises LoweringError without a C++ compiler, and, naming the sites, where a quantized linear or conv did not become
    an int8 kernel; GraphError where torch cannot compile an operation, or would fix the length of a recurrent layer.
    """
    if path.suffix != ".pt2":
        raise GraphError(f"a package ends in .pt2, for torch reads no other: name it {path.with_suffix('.pt2').name}")
    require_one_length(graph)
    require_compiler()
    graph = graph.clone()
    unfold(graph)
    promised = promises(graph)
    spell(graph.native)
    graph.returns = tensors_only(graph.returns)
    program = to_program(graph, keywords=True)
    program._example_inputs = (), {name: feeds[name] for name in graph.input_names}
    kernels = KernelCounts()
    try:
        # With gradients enabled inductor freezes nothing.
        with torch.no_grad(), quiet("torch._inductor", "torch._export", "torch.export"):
            own = {getattr(torch.ops.graphopt, name).default: OPS[name].reference for name in custom_operators.NAMES}
            torch._inductor.aoti_compile_and_package(
                program.run_decompositions(own),
                package_path=str(path),
                inductor_configs={
                    "freezing": True,
                    "post_grad_custom_pre_pass": kernels,
                    "aot_inductor.metadata": dict(metadata),
                },
            )
        kernels.require(promised)
    except LoweringError:
        raise
    except Exception as error:
        raise GraphError(f"AOTInductor cannot compile this graph: {first_line(error)}") from error
    return dict(kernels.counts.most_common())


def tensors_only(returns: Any) -> Any:
    """What a package returns: dicts without entries that are no tensors. Raises GraphError for such entries of a tuple
    or list."""
    if isinstance(returns, dict):
        kept = {key: tensors_only(item) for key, item in returns.items()}
        return {key: item for key, item in kept.items() if item is not None}
    if isinstance(returns, tuple | list):
        items = [tensors_only(item) for item in returns]
        if None in items:
            raise GraphError("a package returns tensors only: the model returns something else in a tuple or list")
        return type(returns)(items)
    return returns if isinstance(returns, Output) else None


def require_one_length(graph: Graph) -> None:
    """Raise GraphError where a recurrent layer runs over a length that may vary: it is compiled as a loop over one."""
    for site in graph.sites(*RECURRENT):
        length = (site.input.shape or ("?",))[0]
        if not isinstance(length, int):
            raise GraphError(
                f"{site.label} is {site.kind} over the dynamic axis {length!r}, and AOTInductor compiles a loop over "
                "one length: leave that axis out of dynamic_shapes (and name the others), or export without aot=True"
            )


def require_compiler() -> None:
    """Raise LoweringError where torch finds no C++ compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise LoweringError(
            "an AOTInductor package is compiled from C++, and torch finds no compiler here: install g++ or clang++ (or "
            "name one in CXX), or export without aot=True: a torch.export archive runs wherever graphopt is installed"
        ) from error


def promises(graph: Graph) -> dict[str, str]:
    """By label the op of each linear and conv that reads a quantized activation and a stored integer weight."""
    found = {}
    for site in graph.sites("linear", "conv"):
        x, weight = site.input.producer, site.required("weight").producer
        if x is None or weight is None or not x.kind == weight.kind == "dequantize":
            continue
        if weight.required("x").is_constant and not x.required("x").is_constant:
            found[f"{site.label} ({site.name})"] = site.kind
    return found


class KernelCounts(CustomGraphPass):
    """Counts the kernels in the graph that inductor generates code from, after freezing."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.left: list[str] = []
        """The module paths of weights that are dequantized at run time for a float kernel."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            self.counts[str(node.target)] += 1
            if str(node.target).startswith("quantized_decomposed.dequantize_per_channel"):
                self.left.append(module_path(node) or node.name)

    def uuid(self) -> None:
        """None: the pass must see every compilation, so inductor may not cache its result."""

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelCounts:
        """Itself: torch copies its options, and the counts are read from this object."""
        return self

    def require(self, promised: Mapping[str, str]) -> None:
        """LoweringError where there are fewer int8 kernels than promised sites."""
        built = sum(number for name, number in self.counts.items() if name.startswith(INT8_KERNELS))
        if built < len(promised):
            left = ", ".join(self.left) or f"some of {', '.join(promised)}"
            raise LoweringError(
                f"{len(promised)} int8 linears and convs were promised and inductor made {built} int8 kernels; in "
                f"float: {left}. Name them in ignore of quantize, or export without aot=True"
            )


def spell(native: Native) -> None:
    """Spell quantize and dequantize as inductor matches them: stored scales and zero points of activations as numbers,
    zero points of weights as a tensor. [changes]"""
    ops = quantized_decomposed()
    for node in list(native.graph.nodes):
        if node.target in (ops.quantize_per_tensor.tensor, ops.dequantize_per_tensor.tensor):
            given = arguments(node)
            scale, zero_point = native.tensor(given["scale"]), native.tensor(given["zero_point"])
            if scale is not None and zero_point is not None:
                bounds = (given["quant_min"], given["quant_max"], given["dtype"])
                node.target = cast(Any, node.target).overloadpacket.default
                node.args, node.kwargs = (given["input"], scale.item(), int(zero_point), *bounds), {}
        elif node.target is ops.dequantize_per_channel.default and node.args[2] is None:
            scales = cast(fx.Node, node.args[1])
            node.update_arg(2, native.add_constant(torch.zeros(meta(scales).shape, dtype=torch.int64)))
