"""PyTorch eager on x86 CPUs with fbgemm's kernels: linear in uint8 x int8 with float32 results, all else as in aten.

A lowered graph holds the operators `graphopt_fbgemm::linear_dynamic` and `linear_static`, which take integers and
scales as they are stored: they trace, export and save, and pack the weight at each call. `compile` packs each weight
once and calls fbgemm directly. Weights use all 8 bits: without VNNI (before Cascade Lake) fbgemm's sums of products
may saturate.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.backend import Backend, LoweringError, Runner
from graphopt.dialects import fx_save
from graphopt.dialects.fx import FxGraph
from graphopt.dialects.fx_native import copied, meta
from graphopt.dialects.fx_words import arguments
from graphopt.graph import Graph, Value
from graphopt.pipeline import UsageError
from graphopt.rewrite import Builder, Declined, Match, Pattern, Recorder, Rule, scalar

_DYNAMIC, _STATIC = "graphopt_fbgemm.linear_dynamic.default", "graphopt_fbgemm.linear_static.default"

INT8_KERNELS = (
    "quantized.linear_dynamic.default",
    "quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default",
)
"""fbgemm's linears, with the input's range chosen at run time and with a stored one."""


class Fbgemm(Backend):
    """fbgemm, called from a graph that runs eagerly."""

    name: ClassVar[str] = "fbgemm"
    dialect: ClassVar[str] = "fx"
    summary: ClassVar[str] = "PyTorch eager on x86 CPUs, int8 linears by fbgemm"
    schemes: ClassVar[Mapping[str, tuple[str, ...]]] = {"linear": ("static", "dynamic")}
    round_to: ClassVar[Mapping[str, int]] = {"neurons": 16, "channels": 16, "width": 16, "rank": 16}
    zeros: str = "weights are packed densely, and zeros multiplied: only compressed files gain"

    def pipeline(self) -> str:
        return "merge-linear,fold-int8"

    def rules(self, graph: Graph) -> Sequence[Sequence[Rule]]:
        return ((Rule("linear-to-fbgemm", _linear_pattern, _lower_linear, shared=True),),)

    def compile(self, graph: Graph, threads: int | None = None) -> FbgemmRunner:
        assert isinstance(graph, FxGraph)
        return FbgemmRunner(graph, threads)

    def check(self, neutral: Graph, runner: Runner) -> None:
        promised = neutral.sites("linear_int8", "conv_int8", "add_int8")
        built = runner.census()
        found = sum(built.get(kernel, 0) for kernel in INT8_KERNELS)
        if found < len(promised):
            assert isinstance(runner, FbgemmRunner)
            left = runner.unlowered or [site.label for site in promised]
            raise LoweringError(
                f"{len(promised)} int8 words were promised and fbgemm runs {found} int8 kernels "
                f"({', '.join(INT8_KERNELS)}); not lowered: {', '.join(left)}"
            )

    def export(
        self,
        graph: Graph,
        path: Path,
        *,
        metadata: Mapping[str, str],
        opset: int | None = None,
        external_data: bool | None = None,
    ) -> None:
        """Write a torch.export archive (.pt2). `FxGraph.load` and `compile` run it fast; `torch.export.load`, after
        this module was imported, runs it anywhere."""
        assert isinstance(graph, FxGraph)
        if opset is not None or external_data is not None:
            raise UsageError("fbgemm writes a torch.export archive; opset and external_data are for ONNX targets")
        part = path.with_name(path.name + ".part")
        try:
            fx_save.save(graph, part, metadata)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


# --- rules ---------------------------------------------------------------------------------------------------------


def _linear_pattern(
    op: Recorder, x: Any, scale: Any, zero_point: Any, x_scale: Any, x_zero: Any, weight: Any, weight_scale: Any,
    bias: Any = None,
) -> Pattern:  # fmt: skip
    steps = op.quantize(x, scale, zero_point)
    return op.linear_int8(steps, x_scale, x_zero, weight, weight_scale, bias)


def _lower_linear(op: Builder, m: Match) -> Value:
    """fbgemm quantizes inside the kernel, so several linears may read one quantize and none of them needs it."""
    if not (_same(op.graph, m.scale, m.x_scale) and _same(op.graph, m.zero_point, m.x_zero)):
        raise Declined("the input is quantized by other parameters than the linear reads")
    if m.x.dtype != torch.float32:
        raise Declined(f"the input is {m.x.dtype}, and fbgemm quantizes float32")
    if not (m.weight.is_constant and m.weight_scale.is_constant and m.weight_scale.rank == 1):
        raise Declined("the weight is not stored with a scale for each output channel")
    if m.bias is not None and not m.bias.is_constant:
        raise Declined("the bias is computed")
    chooser = m.scale.producer
    if chooser is not None and chooser.kind == "choose_qparams" and chooser.results == (m.scale, m.zero_point):
        if chooser.input != m.x:
            raise Declined("the range is chosen from another value than the one quantized")
        return op(_DYNAMIC, m.x, m.weight, m.weight_scale, m.bias)
    if scalar(op.graph, m.scale) is None or scalar(op.graph, m.zero_point) is None:
        raise Declined("the scale of the input is computed by something else than choose_qparams")
    return op(_STATIC, m.x, m.scale, m.zero_point, m.weight, m.weight_scale, m.bias)


def _same(graph: Graph, a: Value, b: Value) -> bool:
    number = scalar(graph, a)
    return a == b or (number is not None and number == scalar(graph, b))


# --- operators -----------------------------------------------------------------------------------------------------


def pack(weight: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
    """fbgemm's packed form of an int8 weight (out, in) with a scale per row, and a float32 bias (out,)."""
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():  # torch deprecates quantized tensors, and has no other way into linear_prepack
            warnings.simplefilter("ignore")
            zeros = torch.zeros(len(scale), dtype=torch.int64)
            steps = torch._make_per_channel_quantized_tensor(weight.contiguous(), scale.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(steps, bias)
    finally:
        torch.backends.quantized.engine = engine


def _linear_dynamic(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.quantized.linear_dynamic(x, pack(weight, weight_scale, bias), False)
    return y


def _linear_static(
    x: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    packed = pack(weight, weight_scale, bias)
    y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        x, scale.item(), int(zero_point.item()), packed
    )
    return y


def _like_dynamic(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _like_static(
    x: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_WEIGHT = "Tensor weight, Tensor weight_scale, Tensor? bias"
for _name, _operands, _kernel, _like in (
    ("linear_dynamic", f"Tensor x, {_WEIGHT}", _linear_dynamic, _like_dynamic),
    ("linear_static", f"Tensor x, Tensor scale, Tensor zero_point, {_WEIGHT}", _linear_static, _like_static),
):
    torch.library.define(f"graphopt_fbgemm::{_name}", f"({_operands}) -> Tensor")
    torch.library.impl(f"graphopt_fbgemm::{_name}", "CPU", _kernel)
    torch.library.register_fake(f"graphopt_fbgemm::{_name}", _like)


# --- running -------------------------------------------------------------------------------------------------------


class FbgemmRunner(Runner):
    """A graph whose linears are packed, run by torch's generated code."""

    def __init__(self, graph: FxGraph, threads: int | None) -> None:
        if "fbgemm" not in torch.backends.quantized.supported_engines:
            raise LoweringError("this build of torch has no fbgemm (it is there on x86-64)")
        graph = graph.clone()
        _drop_identities(graph)
        self.unlowered = [site.label for site in graph.sites("linear_int8", "conv_int8", "add_int8")]
        self._names, self._threads = graph.input_names, threads
        self._sizes = [_example(meta(node)) for node in graph.native.graph.find_nodes(op="placeholder")]
        self._run = _packed_module(graph)

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        with _threads(self._threads), torch.inference_mode():
            return list(self._run(*[feeds[name] for name in self._names]))

    def census(self) -> dict[str, int]:
        """The operators of torch that one run calls, most frequent first, on zeros of the shapes that were traced.

        Composite ones are opened: a float linear counts as aten.addmm, attention as the form that torch chose.
        """
        shapes = zip(self._names, self._sizes, strict=True)
        feeds = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in shapes}
        with torch.no_grad(), _Calls() as calls:
            self._run(*feeds.values())
        return dict(calls.counts.most_common())


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that torch dispatches to a kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _drop_identities(graph: FxGraph) -> None:
    """Copies and views that mean nothing cost a call each."""
    for node in graph.sites("identity"):
        if not node.result.is_output:
            graph.replace(node, node.input)
    graph.sweep()


def _packed_module(graph: FxGraph) -> fx.GraphModule:
    """The graph as a module whose linears call fbgemm on weights that are packed now."""
    program, tensor = copied(graph.native.graph), graph.native.tensor
    stored: dict[str, Any] = {}
    for node in program.nodes:
        if str(node.target) not in (_DYNAMIC, _STATIC):
            continue
        given = arguments(node)
        weight, weight_scale = (cast(Tensor, tensor(given[name])) for name in ("weight", "weight_scale"))
        bias = tensor(given["bias"]) if given["bias"] is not None else None
        name = f"packed_{len(stored)}"
        stored[name] = pack(weight, weight_scale, bias)
        with program.inserting_before(node):
            packed = program.create_node("get_attr", name)
        if str(node.target) == _DYNAMIC:
            node.target, node.args = torch.ops.quantized.linear_dynamic.default, (given["x"], packed, False)
        else:
            scale, zero_point = (cast(Tensor, tensor(given[name])).item() for name in ("scale", "zero_point"))
            node.target = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
            node.args = (given["x"], scale, int(zero_point), packed)
        node.kwargs = {}
    program.eliminate_dead_code()
    for node in program.find_nodes(op="get_attr"):
        if str(node.target) not in stored:
            stored[node.name] = graph.native.stored[str(node.target)]
            node.target = node.name
    module = fx.GraphModule(stored, program)
    for name, thing in stored.items():
        if isinstance(thing, Tensor):  # a plain attribute is found ten times faster than a parameter
            module._parameters.pop(name, None)
            module._buffers.pop(name, None)
            module.__dict__[name] = thing.detach()
    return module


def _example(value: Tensor) -> tuple[list[int], torch.dtype]:
    """A shape that the graph takes, dynamic axes as they were traced, and the dtype."""
    return [size if isinstance(size, int) else int(size.node.hint) for size in value.shape], value.dtype


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is None or number == before:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
