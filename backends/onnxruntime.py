"""ONNX Runtime on CPU: uint8 x int8 kernels, attention whole, and forms that its own fusions do not undo."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from graphopt.backend import Backend, LoweringError, Runner
from graphopt.backends import onnxruntime_weights
from graphopt.dialects import onnx_export, onnx_run
from graphopt.dialects.onnx import OnnxGraph
from graphopt.graph import Graph, Node, Value
from graphopt.islands import is_global
from graphopt.rewrite import Builder, Declined, Match, Pattern, Recorder, Rule, scalar

INT8_KERNELS = {
    "linear_int8": ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"),
    "conv_int8": ("QLinearConv",),
    "add_int8": ("QLinearAdd",),
}
"""The kernels that count as int8, by word."""

QLINEAR = {
    "mul": "QLinearMul",
    "concat": "QLinearConcat",
    "average_pool": "QLinearAveragePool",
    "mean": "QLinearGlobalAveragePool",
    "sigmoid": "QLinearSigmoid",
    "leaky_relu": "QLinearLeakyRelu",
}
"""Words that have one operator for dequantize, the word, and quantize."""


class OnnxRuntime(Backend):
    """Microsoft's engine, on the CPU."""

    name: ClassVar[str] = "onnxruntime"
    dialect: ClassVar[str] = "onnx"
    summary: ClassVar[str] = "ONNX Runtime on CPU; exports a standard .onnx file"
    schemes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "linear": ("static", "dynamic", "weight-only"),
        "conv": ("static",),
        "add": ("static",),
        "embedding": ("weight-only",),
        **dict.fromkeys(QLINEAR, ("static",)),
    }
    floats: ClassVar[tuple[str, ...]] = ("float16",)
    """Stored so, and computed in float32 between casts: files are smaller, not faster."""
    narrow: ClassVar[Mapping[str, tuple[int, ...]]] = {"linear": (8, 4, 2), "embedding": (8, 4)}
    round_to: ClassVar[Mapping[str, int]] = {"neurons": 16, "channels": 16, "width": 16, "rank": 16}
    """A register of AVX-512 floats: blocked convolutions pad channels to it, and GEMM tiles are multiples of it."""
    zeros: ClassVar[str] = (
        "sparse initializers are made dense at load, and no CPU kernel skips zeros: a file is smaller once compressed, "
        "no more"
    )

    def pipeline(self) -> str:
        return "fold-int8"

    def rules(self, graph: Graph) -> Sequence[Sequence[Rule]]:
        weights = onnxruntime_weights.RULES, onnxruntime_weights.FOLDED
        return FLOAT_RULES, (_float_mask_once(),), LINEAR_RULES, ISLAND_RULES, *weights

    def compile(self, graph: Graph, threads: int | None = None) -> OrtRunner:
        assert isinstance(graph, OnnxGraph)
        return OrtRunner(graph, threads)

    def check(self, neutral: Graph, runner: Runner) -> None:
        built = runner.census()
        islands = [site for site in map(_island, neutral.sites("quantize")) if site is not None]
        kinds = INT8_KERNELS | {word: (kernel,) for word, kernel in QLINEAR.items()}
        for word, kernels in kinds.items():
            promised = neutral.sites(word) if word in INT8_KERNELS else [one for one in islands if one.kind == word]
            _require_kernels(built, word, kernels, promised)
        for word, kernel in onnxruntime_weights.KERNELS.items():
            _require_kernels(built, f"weight-only {word}", (kernel,), onnxruntime_weights.promised(neutral, word))

    def export(
        self,
        graph: Graph,
        path: Path,
        *,
        metadata: Mapping[str, str],
        opset: int | None = None,
        external_data: bool | None = None,
    ) -> None:
        assert isinstance(graph, OnnxGraph)
        onnx_export.write(onnx_export.deployable(graph, opset), path, metadata, external_data)

    def graphsurgeon(self, graph: Graph) -> Any:
        assert isinstance(graph, OnnxGraph)
        return onnx_export.graphsurgeon(onnx_export.deployable(graph))


def _require_kernels(built: Mapping[str, int], what: str, kernels: Sequence[str], promised: Sequence[Node]) -> None:
    """Raise LoweringError where fewer kernels were built than sites were promised one."""
    found = sum(built.get(kernel, 0) for kernel in kernels)
    if found < len(promised):
        raise LoweringError(
            f"{len(promised)} {what} were promised and onnxruntime built {found} int8 kernels "
            f"({', '.join(kernels)}) among {', '.join(site.label for site in promised)}"
        )


class OrtRunner(Runner):
    """A session at the default options, of the file as it would be exported."""

    def __init__(self, graph: OnnxGraph, threads: int | None) -> None:
        self.model = onnx_export.deployable(graph)
        self.names = [value.name for value in graph.outputs]
        try:
            self.session = onnx_run.session(self.model, level="all", threads=threads)
        except Exception as error:  # the engine's own exceptions have no base of theirs
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise LoweringError(f"onnxruntime cannot load the model: {reason[0]}") from error

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        return onnx_run.run(self.session, feeds)

    def census(self) -> dict[str, int]:
        """From the model that the session optimized, dumped at the level below hardware layouts."""
        return dict(self._census)

    @cached_property
    def _census(self) -> Counter[str]:
        options = ort.SessionOptions()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimized.onnx"
            options.optimized_model_filepath = str(path)
            # The dump holds every weight: externally, so that no model is too large for it.
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
            onnx_run.session(self.model, level="extended", options=options)
            nodes = onnx.load(path, load_external_data=False).graph.node
        return Counter(sorted(node.op_type for node in nodes))


# --- float forms ---------------------------------------------------------------------------------------------------


def _residual_add(op: Recorder, x: str, residual: str) -> Pattern:
    return op.add(x, residual)


def _is_normalized(m: Match) -> bool:
    added = m.root.result
    return any(user.kind == "layer_norm" and user.input == added for user in added.users)


def _sum_then_norm(op: Builder, m: Match) -> Value:
    """The SkipLayerNormalization that onnxruntime makes of an Add is 6 times slower; it does not match a Sum.

    Whoever else reads the Add (the next residual add of a pre-norm model) reads the Sum too: it is computed once.
    """
    if m.x.shape is None or m.x.shape != m.residual.shape:
        raise Declined("the two inputs of the residual add differ in shape")
    return op("onnx.Sum", m.x, m.residual)


def _split_heads(op: Recorder, name: str) -> Pattern:
    return op.transpose(op.reshape(name, f"{name}_shape"), perm=(0, 2, 1, 3))


def _attention_4d(op: Recorder, query: str, key: str, value: str, query_shape: str, key_shape: str, value_shape: str,
                  shape: str, mask: str | None = None) -> Pattern:  # fmt: skip
    attention = op.attention(
        _split_heads(op, query), _split_heads(op, key), _split_heads(op, value), mask, heads=0, bind="attention"
    )
    return op.reshape(op.transpose(attention, perm=(0, 2, 1, 3)), shape)


def _attention_3d(op: Builder, m: Match) -> Value:
    """Attention that splits the heads itself needs no Reshape and Transpose around it."""
    query, key, value = (m.attention.required(name).shape for name in ("query", "key", "value"))
    split = (query, m.query.shape), (key, m.key.shape), (value, m.value.shape)
    joined = m.attention.result.shape, m.root.result.shape
    if not all(_known_heads(*one) for one in (*split, joined)):
        raise Declined("heads are not known to be split from, and joined to, the last axis")
    attributes = dict(m.attention.attributes) | {"heads": query[1], "kv_heads": key[1]}
    return op.attention(m.query, m.key, m.value, m.mask, **attributes)


def _known_heads(split: tuple[int | str, ...] | None, flat: tuple[int | str, ...] | None) -> bool:
    """Whether (batch, heads, length, size) is (batch, length, heads · size) split, with heads and size known.

    A reshape may also cut the batch or the length, as attention within blocks does; unnamed axes could hide that.
    """
    if split is None or flat is None or len(split) != 4 or len(flat) != 3:
        return False
    batch, heads, length, size = split
    if "?" in (batch, length) or (batch, length) != flat[:2]:
        return False
    return isinstance(heads, int) and isinstance(size, int) and flat[2] == heads * size


def _masked_attention(op: Recorder, query: str, key: str, value: str, mask: str) -> Pattern:
    return op.attention(query, key, value, mask, bind="attention")


def _float_mask_once() -> Rule:
    """A rule for one graph: it remembers the masks that it made, so that every reader after the first shares them."""
    made: dict[Value, Value] = {}

    def shares_boolean_mask(m: Match) -> bool:
        readers = sum(user.kind == "attention" for user in m.mask.users)
        return m.mask.dtype is torch.bool and (readers > 1 or m.mask in made)

    def read_float_mask(op: Builder, m: Match) -> Value:
        """The kernel turns a boolean mask into floats at every layer; for several layers, once is enough."""
        if m.mask not in made:
            dtype = m.query.dtype
            zero, lowest = (op.constant(torch.tensor(n, dtype=dtype)) for n in (0.0, torch.finfo(dtype).min))
            made[m.mask] = op.where(m.mask, zero, lowest)
        return op.attention(m.query, m.key, m.value, made[m.mask], **m.attention.attributes)

    return Rule("float-mask-once", _masked_attention, read_float_mask, check=shares_boolean_mask)


FLOAT_RULES = (
    Rule("sum-then-norm", _residual_add, _sum_then_norm, check=_is_normalized),
    Rule("attention-3d", _attention_4d, _attention_3d),
)


# --- int8 forms ----------------------------------------------------------------------------------------------------


def _stored_kn(op: Builder, weight: Value) -> Value:
    """The engine's kernels read weights as (in, out); the constant is laid out so once, here."""
    tensor = op.graph.constant(weight)
    if tensor is None:
        raise Declined("the int8 weight is not constant")
    return op.constant(tensor.t().contiguous())


def _dynamic_pattern(op: Recorder, x: str, weight: str, weight_scale: str, bias: str | None = None) -> Pattern:
    quantized = op.quantize(x, "scale", "zero_point")
    return op.linear_int8(quantized, "scale", "zero_point", weight, weight_scale, bias)


def _dynamic_matmul(op: Builder, m: Match) -> Value:
    """One kernel quantizes and multiplies, where nobody else needs the quantized value."""
    if len(m.scale.users) != 2 or len(m.zero_point.users) != 2:  # quantize and this linear
        raise Declined("several linears share the quantized input")
    return op("com.microsoft.DynamicQuantizeMatMul", m.x, _stored_kn(op, m.weight), m.weight_scale, None, m.bias)


def _integer_pattern(op: Recorder, x: str, scale: str, zero_point: str, weight: str, weight_scale: str,
                     bias: str | None = None) -> Pattern:  # fmt: skip
    return op.linear_int8(x, scale, zero_point, weight, weight_scale, bias)


def _integer_to_float(op: Builder, m: Match) -> Value:
    """One quantized input serves several of these."""
    weight = _stored_kn(op, m.weight)
    return op(
        "com.microsoft.MatMulIntegerToFloat", m.x, weight, m.scale, m.weight_scale, m.zero_point, None, m.bias
    )


def _conv_pattern(op: Recorder, x: str, scale: str, zero_point: str, weight: str, weight_scale: str, y_scale: str,
                  y_zero_point: str, bias: str | None = None) -> Pattern:  # fmt: skip
    return op.conv_int8(x, scale, zero_point, weight, weight_scale, y_scale, y_zero_point, bias)


def _qlinear_conv(op: Builder, m: Match) -> Value:
    """Bias goes in as int32 steps of scale · weight_scale (ONNX QLinearConv)."""
    graph, weight = op.graph, op.graph.constant(m.weight)
    scale, weight_scale = graph.constant(m.scale), graph.constant(m.weight_scale)
    if weight is None or scale is None or weight_scale is None:
        raise Declined("its scales are not constant")
    bias = graph.constant(m.bias) if m.bias is not None else None
    if m.bias is not None and bias is None:
        raise Declined("its bias is computed by the graph")
    steps = None
    if bias is not None:
        limits = torch.iinfo(torch.int32)
        rounded = (bias.double() / (scale.double() * weight_scale.double())).round()
        steps = op.constant(rounded.clamp(limits.min, limits.max).to(torch.int32))
    zero = op.constant(torch.zeros(weight_scale.shape, dtype=torch.int8))
    site = m.root.attributes
    return op(
        "onnx.QLinearConv", m.x, m.scale, m.zero_point, m.weight, m.weight_scale, zero, m.y_scale, m.y_zero_point,
        steps, strides=site["stride"], pads=site["padding"], dilations=site["dilation"], group=site["groups"],
    )  # fmt: skip


def _add_pattern(op: Recorder, a: str, a_scale: str, a_zero_point: str, b: str, b_scale: str, b_zero_point: str,
                 y_scale: str, y_zero_point: str) -> Pattern:  # fmt: skip
    return op.add_int8(a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale, y_zero_point)


def _qlinear_add(op: Builder, m: Match) -> Value:
    """The contrib kernel adds without leaving int8."""
    return op("com.microsoft.QLinearAdd", m.a, m.a_scale, m.a_zero_point, m.b, m.b_scale, m.b_zero_point,
              m.y_scale, m.y_zero_point)  # fmt: skip


def _padded_pattern(op: Recorder, x: str, scale: str, zero_point: str, weight: str, weight_scale: str, y_scale: str,
                    y_zero_point: str, bias: str | None = None) -> Pattern:  # fmt: skip
    padded = op.pad(x, bind="pad")
    return op.conv_int8(padded, scale, zero_point, weight, weight_scale, y_scale, y_zero_point, bias)


def _pads_with_zero_point(m: Match) -> bool:
    before, attributes = m.pad.attributes["padding"], m.pad.attributes
    rank = len(before) // 2
    outside = (*before[:2], *before[rank : rank + 2])
    return scalar(m.root.graph, m.zero_point) == attributes["value"] and not any(outside) and min(before) >= 0


def _pad_inside(op: Builder, m: Match) -> Value:
    """The kernel pads by itself, without a copy of its input."""
    before, given = m.pad.attributes["padding"], dict(m.root.attributes)
    rank = len(before) // 2
    around = (*before[2:rank], *before[rank + 2 :])
    own = given["padding"] or (0,) * len(around)
    given["padding"] = tuple(one + other for one, other in zip(around, own, strict=True))
    return op.conv_int8(m.x, *m.root.operands[1:], **given)


def _quantized_pattern(op: Recorder, x: str, scale: str, zero_point: str) -> Pattern:
    return op.quantize(x, scale, zero_point)


def _island(quantize: Node) -> Node | None:
    """The word of QLINEAR whose result a quantize alone reads, in the form that its operator computes."""
    word = quantize.input.producer
    if word is None or word.kind not in QLINEAR or word.result.is_output or len(word.result.users) != 1:
        return None
    makers = [value.producer for value in word.operands if value is not None]
    if word.kind == "mean" and not is_global(word):
        return None
    return word if all(one is not None and _is_u8(one, one.input) for one in makers) and _is_u8(quantize) else None


def _is_u8(node: Node, steps: Value | None = None) -> bool:
    """Whether a quantize or dequantize is to or from uint8, by a stored scale for all."""
    if node.kind not in ("quantize", "dequantize"):
        return False
    zero_point = node.operand("zero_point")
    stored = node.required("scale").is_constant and zero_point is not None and zero_point.is_constant
    dtypes = {value.dtype for value in (zero_point, steps) if value is not None}
    return stored and node.required("scale").rank == 0 and dtypes == {torch.uint8}


def _qlinear(op: Builder, m: Match) -> Value:
    """One operator computes without leaving integers."""
    word = _island(m.root)
    assert word is not None  # checked
    makers = [value.producer for value in word.operands if value is not None]
    sides = [side for one in makers if one is not None for side in one.operands]
    result: tuple[Value, ...] = (m.scale, m.zero_point)
    given = word.attributes
    attributes: dict[str, Any] = {}
    match word.kind:
        case "concat":
            sides, result, attributes = [*result, *sides], (), {"axis": given["axis"]}
        case "average_pool":
            attributes = {
                "kernel_shape": given["kernel"], "strides": given["stride"] or (1,) * len(given["kernel"]),
                "pads": given["padding"] or (0, 0) * len(given["kernel"]), "ceil_mode": int(given["ceil"]),
                "count_include_pad": int(given["include_pad"]),
            }  # fmt: skip
        case "leaky_relu":
            attributes = {"alpha": float(given["slope"])}
    return op(f"com.microsoft.{QLINEAR[word.kind]}", *sides, *result, **attributes)


def _is_dynamic(m: Match) -> bool:
    ranges = m.scale.producer
    return ranges is not None and ranges.kind == "choose_qparams"


LINEAR_RULES = (Rule("dynamic-quantize-matmul", _dynamic_pattern, _dynamic_matmul, check=_is_dynamic),)
ISLAND_RULES = (
    Rule("pad-into-conv", _padded_pattern, _pad_inside, check=_pads_with_zero_point),
    Rule("matmul-integer-to-float", _integer_pattern, _integer_to_float),
    Rule("qlinear-conv", _conv_pattern, _qlinear_conv),
    Rule("qlinear-add", _add_pattern, _qlinear_add),
    Rule("qlinear", _quantized_pattern, _qlinear, check=lambda m: _island(m.root) is not None),
    onnx_export.DYNAMIC_QUANTIZE,
)
