"""PyTorch on an NVIDIA GPU: 8-bit products by `_int_mm` and `_scaled_mm`, zeros in 2:4, torch.compile around it all.

A graph is captured, changed and checked on the CPU, where the operators of `cuda_kernels` compute the same; it goes to
the GPU when it is compiled. Without a GPU it is lowered all the same, in the static order of forms, and written.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphopt.backends.cuda import kernels as cuda_kernels
from graphopt.backends.cuda.kernels import MULTIPLE, SPARSE
from graphopt.dialects.fx import archive
from graphopt.dialects.fx.graph import FxGraph
from graphopt.dialects.fx.native import copied
from graphopt.dialects.fx.spellings import arguments
from graphopt.errors import LoweringError, UsageError
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder, Rule
from graphopt.lowering.backend import Backend, Runner
from graphopt.lowering.choices import Measuring
from graphopt.pipeline.target import Placement

FLOAT8, SPARSE_24 = (8, 9), (8, 0)
"""The first compute capability with products in float8, and with those that skip zeros in 2:4."""

WASTE = 1.25
"""Most that filling up a weight may grow it by: int8 gains about 2 where it is not memory that counts."""

SHAPES = 8
"""Input shapes that get a program of their own; what comes after them shares one with dynamic axes."""

OPTIONS = {"max_autotune": True, "coordinate_descent_tuning": True, "triton.cudagraphs": True}
"""Of Inductor: what torch.compile's mode max-autotune means."""


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


class Cuda(Backend):
    """torch on a GPU."""

    name: ClassVar[str] = "cuda"
    dialect: ClassVar[str] = "fx"
    summary: ClassVar[str] = "PyTorch on NVIDIA GPUs: int8, float8, 2:4 under torch.compile and CUDA graphs"
    schemes: ClassVar[Mapping[str, tuple[str, ...]]] = {"linear": ("static", "dynamic", "weight-only")}
    weight_bits: ClassVar[Mapping[str, tuple[int, ...]]] = {"linear": (8,)}
    types: ClassVar[tuple[str, ...]] = ("int8", "float8")
    placement: ClassVar[Placement | None] = Placement(signed=True, rows=True)
    floats: ClassVar[tuple[str, ...]] = ("bfloat16", "float16")
    round_to: ClassVar[Mapping[str, int]] = {"neurons": 32, "channels": 32, "width": 32, "rank": 32}
    """Sizes of a weight in 2:4; the kernels of 8 bits take multiples of 8 and 16."""

    def __init__(self, cpu: str | None = None, device: Device | None = None) -> None:
        """device: the GPU to lower for; None is this machine's, if it has one. Raises UsageError where cpu is given."""
        if cpu is not None:
            raise UsageError(f"target cuda runs on a GPU: leave out cpu={cpu}")
        super().__init__()
        self.device = device or Device.here()
        self.runs = self.device is not None
        self.sparse = () if self.device is not None and self.device.capability < SPARSE_24 else ("2:4",)
        self.zeros = (
            f"kernels skip zeros in 2:4, in weights of 16 or 8 bits whose sizes are multiples of "
            f"{SPARSE[torch.float16]} or {SPARSE[torch.int8]}: cast or quantize behind sparsify"
            if self.sparse
            else f"zeros in 2:4 are skipped from compute capability 8.0 on, and this is {self.device}"
        )

    def notes(self) -> list[str]:
        if self.device is not None:
            return [f"captured and checked on the CPU, run on {self.device}"]
        return [
            "lowered for an NVIDIA GPU and not run on one: outputs are those of the same operators on the CPU. float8 "
            "needs compute capability 8.9, zeros in 2:4 need 8.0"
        ]

    def product_bits(self) -> int:
        """8: its sums have 32 bits."""
        return 8

    def times(self) -> bool:
        self.require_runs()
        return True

    def require_runs(self) -> None:
        if not self.runs:
            build = "was built without CUDA" if torch.version.cuda is None else "sees none"
            raise UsageError(
                f"target cuda runs on an NVIDIA GPU, and torch {torch.__version__} {build}: give measure=False to "
                f"lower without running, and export() to write the archive for a machine that has one"
            )

    def clock(self) -> float:
        """Kernels run behind the caller's back: the device is waited for. Its own events have too coarse a time."""
        torch.cuda.synchronize()
        return time.perf_counter()

    def place(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: tensor.to("cuda") for name, tensor in feeds.items()}

    def why_float(self, site: Node, scheme: str, dtype: str) -> str | None:
        """Raises UsageError where the GPU is too old for a type."""
        if dtype == "float8" and self.device is not None and self.device.capability < FLOAT8:
            needs = "float8 needs a GPU of compute capability 8.9"
            raise UsageError(f"{needs}, and this is {self.device}: give dtype=int8")
        shape = site.required("weight").shape
        if site.kind != "linear" or shape is None or scheme == "weight-only":
            return None
        multiple = MULTIPLE[torch.float8_e4m3fn if dtype == "float8" else torch.int8]
        return _why_wasteful(int(shape[0]), int(shape[1]), multiple)

    def pipeline(self) -> str:
        return "merge-linear"

    def rules(self, graph: Graph) -> Sequence[Sequence[Rule | Choice]]:
        skipping = (PRODUCT_24, FLOATS_24) if self.sparse else ()
        return ((*skipping, PRODUCT, WEIGHT_ONLY),)

    def engine(self) -> str:
        name = None if self.device is None else self.device.name
        return f"torch {torch.__version__}, CUDA {torch.version.cuda}, {name}"

    def chooser(self, feeds: Sequence[Mapping[str, Tensor]], threads: int | None = None) -> Measuring:
        return Measuring(self.engine(), feeds, self.compile, clock=self.clock, place=self.place)

    def compile(self, graph: Graph, threads: int | None = None) -> CudaRunner:
        """threads: of the CPU, which has nothing to do here."""
        assert isinstance(graph, FxGraph)
        return CudaRunner(graph, self.device)

    def check(self, folded: Graph, runner: Runner) -> None:
        promised = [site for site in folded.sites("linear") if why_not(site) is None]
        own = {kind: count for kind, count in runner.kernels().items() if kind.startswith(_OWN)}
        built = sum(count for kind, count in own.items() if kind not in _OF_FLOATS)
        if built < len(promised):
            raise LoweringError(
                f"{len(promised)} linears in 8 bits were promised and the program has {built} operators for them, of "
                f"{', '.join(site.label for site in promised)}"
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
        """Write a torch.export archive (.pt2), its weights on the CPU. After `import graphopt.backends.cuda`,
        torch.export.load reads it, and torch.export.passes.move_to_device_pass puts it on a GPU; `FxGraph.load` and
        `compile` do both."""
        assert isinstance(graph, FxGraph)
        if opset is not None or external_data is not None:
            raise UsageError("cuda writes a torch.export archive; opset and external_data are for ONNX targets")
        archive.save(graph, path, metadata)


# --- which linears have kernels ------------------------------------------------------------------------------------


def _dequantized(value: Value) -> Node | None:
    """The dequantize that makes a value, behind the cast that a site in 16 bits reads it through."""
    maker = value.producer
    if maker is not None and maker.kind == "cast":
        maker = maker.input.producer
    return maker if maker is not None and maker.kind == "dequantize" else None


def why_not(site: Node) -> str | None:
    """Why a linear has no kernel that reads its weight in 8 bits."""
    weight, x = _dequantized(site.required("weight")), _dequantized(site.input)
    if weight is None or not all(value is None or value.is_constant for value in weight.operands):
        return "weight is not stored in 8 bits"
    steps, attributes = weight.required("x"), weight.attributes
    if steps.dtype not in MULTIPLE or weight.operand("zero_point") is not None:
        return f"weight is {steps.dtype} with zero points, or in another form than int8 or float8 about zero"
    if attributes["axis"] != 0 or attributes["block"] or weight.required("scale").rank != 1:
        return "weight has other scales than one for each output"
    if x is None:
        floats = steps.dtype != torch.int8
        return "activations are no float8, and weights alone in float8 have no kernel" if floats else None
    if x.required("x").dtype != steps.dtype or not _is_about_zero(x):
        return f"activations are {x.required('x').dtype}, and kernels take {steps.dtype} about zero on both sides"
    scale = x.required("scale")
    if scale.rank != 0 and not (scale.rank == x.result.rank and scale.shape is not None and scale.shape[-1] == 1):
        return "activations have other scales than one, or one for each row"
    assert steps.shape is not None
    return _why_wasteful(int(steps.shape[0]), int(steps.shape[1]), MULTIPLE[steps.dtype])


def _is_about_zero(maker: Node) -> bool:
    zero_point = maker.operand("zero_point")
    tensor = None if zero_point is None else maker.graph.constant(zero_point)
    return zero_point is None or (tensor is not None and not bool(tensor.float().any()))


def _why_wasteful(outputs: int, inputs: int, multiple: int) -> str | None:
    """Why a weight is not filled up to multiples."""
    filled = (outputs + -outputs % multiple) * (inputs + -inputs % multiple)
    if filled <= WASTE * outputs * inputs:
        return None
    return (f"kernels of 8 bits take multiples of {multiple}, and to fill up {outputs} x {inputs} would make it "
            f"{filled / (outputs * inputs):.2g} times as large")  # fmt: skip


def _why_dense(weight: Tensor | None) -> str | None:
    """Why the kernels for 2:4 do not take a weight."""
    if weight is None or weight.dtype not in SPARSE:
        return "weight is not stored in 16 or 8 bits"
    outputs, inputs = SPARSE[weight.dtype]
    if weight.shape[0] % outputs or weight.shape[1] % inputs:
        return f"kernels for 2:4 take multiples of {outputs} x {inputs}, not {list(weight.shape)}"
    return None if cuda_kernels.is_sparse(weight) else "weight has more than two of four that are not zero"


# --- forms ---------------------------------------------------------------------------------------------------------


def _linear(op: Recorder, x: str, weight: str, bias: str | None = None) -> Pattern:
    return op.linear(x, weight, bias)


def _is_product(m: Match) -> bool:
    return why_not(m.root) is None and _dequantized(m.x) is not None


def _steps(m: Match) -> Tensor | None:
    """The weight of a product as it is stored."""
    maker = _dequantized(m.weight)
    return None if maker is None else m.root.graph.constant(maker.required("x"))


def _is_sparse_product(m: Match) -> bool:
    return _is_product(m) and _why_dense(_steps(m)) is None


def _is_sparse_float(m: Match) -> bool:
    weight = m.root.weight
    return weight is not None and weight.dtype.itemsize == 2 and cuda_kernels.is_sparse(weight)


def _around(m: Match) -> list[Node]:
    """A product with what quantizes its input, and makes floats of integers: all that a kernel stands for."""
    wanted = {m.root}
    for value in (m.x, m.weight):
        while value.producer is not None and value.producer.kind in ("cast", "dequantize", "quantize", "row_scale"):
            node = value.producer
            wanted.add(node)
            ranges = [one.producer for one in node.operands[1:] if one is not None and one.producer is not None]
            wanted.update(one for one in ranges if one.kind == "row_scale")
            value = node.input
    return [node for node in m.root.graph.nodes if node in wanted]


def _parts(op: Builder, m: Match) -> tuple[Value, Value, Tensor, Value]:
    """Of a product: the steps of its input, their scale, the weight's steps, and their scales."""
    x, weight = _dequantized(m.x), _dequantized(m.weight)
    assert x is not None and weight is not None
    steps = op.graph.constant(weight.required("x"))
    assert steps is not None
    return x.required("x"), x.required("scale"), steps, weight.required("scale")


def _dense(op: Builder, m: Match) -> Value:
    """cuBLAS, or Inductor's own kernel where that is faster; scales and bias in what is fused behind it."""
    x, scale, weight, weight_scale = _parts(op, m)
    kernel = "linear_int8" if weight.dtype == torch.int8 else "linear_float8"
    operands = x, scale, op.constant(_filled(weight)), weight_scale, m.bias
    return op(f"{_OWN}{kernel}.default", *operands, dtype=m.root.result.dtype)


def _fused(op: Builder, m: Match) -> Value:
    """One Triton kernel that leaves floats; it has no least number of rows, as when decoding."""
    x, scale, weight, weight_scale = _parts(op, m)
    if weight.dtype != torch.int8:
        raise Declined("the Triton kernel is for int8")
    if not cuda_kernels.has_triton():
        raise Declined("triton is not installed")
    operands = x, scale, op.constant(_filled(weight)), weight_scale, m.bias
    return op(f"{_OWN}linear_int8_fused.default", *operands, dtype=m.root.result.dtype)


def _sparse(op: Builder, m: Match) -> Value:
    """Tensor cores that skip the zeros, by CUTLASS or cuSPARSELt."""
    x, scale, weight, weight_scale = _parts(op, m)
    packed = map(op.constant, cuda_kernels.compress(weight))
    sizes: dict[str, Any] = {"outputs": weight.shape[0], "dtype": m.root.result.dtype}
    return op(f"{_OWN}linear_int8_sparse.default", x, scale, *packed, weight_scale, m.bias, **sizes)


def _sparse_float(op: Builder, m: Match) -> Value:
    weight = m.root.weight
    if (reason := _why_dense(weight)) is not None:
        raise Declined(reason)
    assert weight is not None
    packed = map(op.constant, cuda_kernels.compress(weight))
    return op(f"{_OWN}linear_sparse.default", m.x, *packed, m.bias, outputs=weight.shape[0])


def _weight_only(op: Builder, m: Match) -> Value:
    """Scaled behind the product: a compiler reads the integers inside it, half the bytes that decoding waits for."""
    maker = _dequantized(m.weight)
    assert maker is not None
    return op(f"{_OWN}linear_weight_int8.default", m.x, maker.required("x"), maker.required("scale"), m.bias)


def _filled(weight: Tensor) -> Tensor:
    """A weight with zeros up to the multiples that kernels take; operators know its size by its scales."""
    multiple = MULTIPLE[weight.dtype]
    outputs, inputs = (size + -size % multiple for size in weight.shape)
    filled = weight.new_zeros((outputs, inputs))
    filled[: weight.shape[0], : weight.shape[1]] = weight
    return filled


_OWN = "graphopt_cuda."
_OF_FLOATS = (f"{_OWN}linear_sparse.default",)

PRODUCT_24 = Choice(
    "8-bit-linear-2:4", _linear, {"2:4": _sparse, "dense": _dense, "triton": _fused},
    check=_is_sparse_product, around=_around,
)  # fmt: skip
PRODUCT = Choice("8-bit-linear", _linear, {"dense": _dense, "triton": _fused}, check=_is_product, around=_around)
FLOATS_24 = Choice("linear-2:4", _linear, {"2:4": _sparse_float, "dense": None}, check=_is_sparse_float)
WEIGHT_ONLY = Rule(
    "int8-weight", _linear, _weight_only, check=lambda m: why_not(m.root) is None and _dequantized(m.x) is None
)


# --- running -------------------------------------------------------------------------------------------------------


class CudaRunner(Runner):
    """A graph on the GPU under torch.compile and CUDA graphs; without a GPU, eagerly on the CPU."""

    def __init__(self, graph: FxGraph, device: Device | None) -> None:
        self._graph, self._names, self._device = graph, graph.input_names, device
        self._programs: dict[Any, Callable[..., Any]] = {}
        if device is None:
            self._module = on_device(graph, "cpu", pack=lambda dtype: None)
            return
        weights = sum(tensor.nbytes for _, tensor in graph.constants())
        if weights > device.memory:
            raise LoweringError(
                f"out of memory: weights of {weights / 1e9:.3g} GB do not fit the {device.memory / 1e9:.3g} GB that "
                f"are free on {device}; quantize or prune more, the model is as it was"
            )
        with self._memory("while its weights were moved there"):
            self._module = on_device(graph, "cuda", pack=_pack_for(device))

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """Results lie where the first input does."""
        given = [feeds[name] for name in self._names]
        if self._device is None:
            with torch.no_grad():
                return list(self._module(*given))
        home = given[0].device if given else torch.device("cuda")
        with self._memory(f"at inputs of {[list(one.shape) for one in given]}"), torch.no_grad():
            placed = [one.to("cuda", non_blocking=True) for one in given]
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            results = self._program(placed)(*placed)
            return [one.clone() if home.type == "cuda" else one.to(home) for one in results]  # graphs reuse theirs

    def kernels(self) -> dict[str, int]:
        """The operators of the program; what kernels torch.compile makes of them, it does not tell."""
        return dict(Counter(node.kind for node in self._graph.nodes).most_common())

    def _program(self, given: Sequence[Tensor]) -> Callable[..., Any]:
        shapes: Any = tuple((tuple(one.shape), one.dtype) for one in given)
        if shapes not in self._programs:
            dynamic = len(self._programs) >= SHAPES
            shapes = "any" if dynamic else shapes
            if shapes not in self._programs:
                module = fx.GraphModule(self._module, copied(self._module.graph))
                self._programs[shapes] = torch.compile(module, dynamic=dynamic, fullgraph=True, options=dict(OPTIONS))
        return self._programs[shapes]

    @contextmanager
    def _memory(self, when: str) -> Iterator[None]:
        """LoweringError where the GPU has no room, which is then free again."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self._programs.clear()
            torch.cuda.empty_cache()
            raise LoweringError(
                f"out of memory on {self._device} {when}: give smaller example inputs, or quantize or prune more; the "
                f"model is as it was"
            ) from error


Pack = Callable[[Tensor, Tensor], Tensor]
"""From a weight in 2:4 as `compress` gives it to cuSPARSELt's form."""


def _pack_for(device: Device) -> Callable[[torch.dtype], Pack | None]:
    """CUTLASS has kernels for compute capability 8.x alone, and none for float8."""

    def pack(dtype: torch.dtype) -> Pack | None:
        return None if device.capability[0] == 8 and dtype != torch.float8_e4m3fn else cuda_kernels.pack_cusparselt

    return pack


def on_device(graph: FxGraph, device: str, pack: Callable[[torch.dtype], Pack | None]) -> fx.GraphModule:
    """A graph as a module on a device: its weights, what its nodes name, and weights in 2:4 as `pack` wants them."""
    program, stored = copied(graph.native.graph), dict[str, Any]()
    for node in program.nodes:
        if node.op == "get_attr":
            thing = graph.native.stored[str(node.target)]
            stored[str(node.target)] = _placed(thing, device) if isinstance(thing, Tensor) else thing
        elif node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, lambda one: _moved(one, device))
            node.kwargs = fx.node.map_aggregate(node.kwargs, lambda one: _moved(one, device))
    for node in program.nodes:
        if str(node.target) in (f"{_OWN}linear_sparse.default", f"{_OWN}linear_int8_sparse.default"):
            given = arguments(node)
            packed, meta = stored[str(given["packed"].target)], stored[str(given["meta"].target)]
            if (make := pack(packed.dtype)) is not None:
                stored[str(given["packed"].target)] = make(packed, meta)
                node.args = tuple(None if one is given["meta"] else one for one in node.args)
    program.eliminate_dead_code()
    return fx.GraphModule({name: thing for name, thing in stored.items() if _is_read(program, name)}, program)


def _placed(tensor: Tensor, device: str) -> Tensor:
    """`.to(device)`, which would ask for a device that fake tensors only name."""
    copied: Tensor = torch.ops.aten._to_copy.default(tensor.detach(), device=torch.device(device))
    return copied


def _moved(argument: Any, device: str) -> Any:
    return torch.device(device) if isinstance(argument, torch.device) else argument


def _is_read(program: fx.Graph, name: str) -> bool:
    return any(str(node.target) == name for node in program.find_nodes(op="get_attr"))
