"""What must hold of every model: each property is a function that raises AssertionError where it does not."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch

import graphopt
from graphopt.backends.onnxruntime.target import OnnxRuntime
from graphopt.errors import GraphoptError, UsageError
from graphopt.ir.graph import Graph, Value
from graphopt.ir.rewrite import Choice, Rule
from graphopt.numerics.metrics import sqnr
from tests.fuzz.onnx_graphs import SIZES, Array, runs, session, sizes

LONGEST = 300
"""Most characters of a message of graphopt."""
LEVELS = ("DISABLE_ALL", "ENABLE_ALL")

Feeds = Mapping[str, Array]
Expected = Sequence[tuple[Feeds, list[Any]]]


def simplify_keeps_the_numbers(model: onnx.ModelProto, feeds: Feeds) -> None:
    """What is written after simplify and lowering computes what the engine computes of the model, at every level, and
    at other sizes of its dynamic axes too. A second run changes nothing."""
    expected = _expected(model, feeds)
    small = graphopt.optimize(model, "simplify")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.onnx"
        small.export(path)
        _assert_same(model, onnx.load(path), expected)
        again = graphopt.optimize(path, "simplify")
        again.export(Path(folder) / "again.onnx")
        _assert_same(model, onnx.load(Path(folder) / "again.onnx"), expected)


def every_form_keeps_the_numbers(model: onnx.ModelProto, feeds: Feeds) -> None:
    """The same, whatever legal forms the lowering takes."""
    expected = _expected(model, feeds)
    for seed in range(3):
        with _forms_in_another_order(seed), tempfile.TemporaryDirectory() as folder:
            written = graphopt.optimize(model, "simplify").export(Path(folder) / "out.onnx")
            _assert_same(model, onnx.load(written), expected)


def export_at(opset: int, model: onnx.ModelProto, feeds: Feeds) -> bool:
    """At another opset the file is valid and computes the same, or is refused by name. Whether it was written."""
    expected = _expected(model, feeds)
    small = graphopt.optimize(model, "simplify")
    with tempfile.TemporaryDirectory() as folder:
        try:
            written = onnx.load(small.export(Path(folder) / "out.onnx", opset=opset))
        except GraphoptError as error:
            assert len(str(error)) <= LONGEST, error
            names = [*(node.name for node in model.graph.node), *(output.name for output in model.graph.output)]
            assert any(name in str(error) for name in names), f"names no node: {error}"
            return False
    assert [entry.version for entry in written.opset_import if entry.domain == ""] == [opset]
    if all(output.type.tensor_type.HasField("shape") for output in written.graph.output):
        onnx.checker.check_model(written)  # which refuses outputs of unknown rank; engines do not
    _assert_same(model, written, expected)
    return True


def a_text_and_a_file_are_the_graph(model: onnx.ModelProto, feeds: Feeds) -> None:
    """A graph that is saved and read again, or cloned, has the same text."""
    graph = graphopt.optimize(model, "simplify").folded
    with tempfile.TemporaryDirectory() as folder:
        graph.save(Path(folder) / "graph")
        assert type(graph).load(Path(folder) / "graph").text() == graph.text()
    assert graph.clone().text() == graph.text()


PASSES = {
    "quantize{scheme=dynamic}": 15.0, "quantize{scheme=weight-only}": 20.0, "quantize{scheme=static}": 8.0,
    "quantize{scheme=weight-only bits=4}": 3.0, "sparsify{amount=0}": 60.0, "low-rank{energy=1}": 40.0, "cast": 30.0,
    "prune{channels=0.5}": None, "prune{neurons=0.5}": None, "merge-linear": 60.0,
}  # fmt: skip
"""Passes, and the least SQNR in dB of outputs that nothing breaks off; None where only their shapes stay."""
_BREAKS_OFF = {
    "Hardmax", "ArgMax", "ArgMin", "TopK", "Greater", "Less", "LessOrEqual", "GreaterOrEqual", "Equal", "Floor", "Ceil",
    "Round", "Sign", "Mod", "NonZero", "Cast", "Shrink", "ThresholdedRelu", "Where", "If", "Log", "Reciprocal", "Div",
    "Pow", "Tan", "IsInf", "IsNaN", "Compress", "QuantizeLinear", "DynamicQuantizeLinear", "ReduceLogSum", "Exp", "Acosh",
    "LpNormalization", "MeanVarianceNormalization", "InstanceNormalization", "Sqrt", "LayerNormalization",
    "ReduceProd", "Det", "Acos", "Asin", "Atanh", "Cosh", "Sinh", "GroupNormalization", "RMSNormalization", "ReduceL2",
}  # fmt: skip
"""Operators that make much of little: with them an output may be any other."""


def a_pass_counts_every_weight(passes: str, model: onnx.ModelProto, feeds: Feeds) -> None:
    """A lossy pass changes or declines each op with weights, keeps the shapes of outputs, makes no NaN, and stays as
    near as its bits allow; or it says what it lacks."""
    expected = _expected(model, feeds)[:1]
    try:
        batches = [{name: array.copy() for name, array in fed.items()} for fed, _ in expected]
        small = graphopt.optimize(model, passes, example_inputs=batches[0], calibration=batches)
    except UsageError as error:
        assert len(str(error)) <= 2 * LONGEST and "failed" not in str(error), error
        return
    name = passes.partition("{")[0]
    record = next(one for one in small.report.passes if one.name == name)
    if name != "merge-linear":
        weighted = {node.label for node in graphopt.optimize(model, "simplify").transformed.nodes
                    if node.kind in _WEIGHTED and _is_matrix(node.operands[1])}  # fmt: skip
        assert weighted <= set(record.eligible), f"passed over {weighted - set(record.eligible)}"
    with tempfile.TemporaryDirectory() as folder:
        written = onnx.load(small.export(Path(folder) / "out.onnx"))
    floor = None if {node.op_type for node in model.graph.node} & _BREAKS_OFF else PASSES[passes]
    for level in LEVELS:
        for fed, outputs in expected:
            found = session(written, level).run(None, dict(fed))
            for output, a, b in zip(model.graph.output, outputs, found, strict=True):
                where = f"{output.name} at {level} after {passes}"
                known = "NonZero" not in {node.op_type for node in model.graph.node}
                assert (a.shape == b.shape or not known) and a.dtype == b.dtype, f"{where}: {b.dtype} {b.shape}"
                if a.dtype == np.float32 and a.shape == b.shape:
                    assert np.isfinite(b).all(), f"{where}: not finite"
                    if floor is not None and float(np.abs(a).max()) > 1e-3 and a.size > 3:
                        noise = _sqnr(a, b)
                        assert noise >= floor, f"{where}: {noise:.1f} dB"


_WEIGHTED = ("linear", "conv", "conv_transpose", "lstm", "gru", "rnn")


def _is_matrix(value: Value | None) -> bool:
    is_float = value is not None and value.is_constant and value.dtype == torch.float32
    return is_float and value is not None and sum(size != 1 for size in value.shape or ()) > 1


Property = Callable[[onnx.ModelProto, Feeds], object]


@contextmanager
def _forms_in_another_order(seed: int) -> Iterator[None]:
    """Within the block, the lowering to ONNX Runtime prefers forms in an order that is drawn."""
    original = OnnxRuntime.rules

    def shuffled(target: OnnxRuntime, graph: Graph) -> Sequence[Sequence[Rule | Choice]]:
        return [[_shuffled(one, seed) if isinstance(one, Choice) else one for one in stage]
                for stage in original(target, graph)]  # fmt: skip

    with mock.patch.object(OnnxRuntime, "rules", shuffled):
        yield


def _shuffled(choice: Choice, seed: int) -> Choice:
    names = list(choice.forms)
    random.Random(f"{seed}{choice.name}").shuffle(names)
    return replace(choice, forms={name: choice.forms[name] for name in names})


def _expected(model: onnx.ModelProto, feeds: Feeds) -> Expected:
    """Feeds and what the engine computes on them: as drawn, and at other sizes of the dynamic axes where it runs."""
    outputs = runs(model, feeds)
    assert outputs is not None
    found = [(feeds, outputs)]
    for seed, named in enumerate(({"n": 3, "s": 5}, {"n": 1, "s": 2})):
        fed = _at(model, feeds, SIZES | named, np.random.default_rng(seed))
        with_others = None if fed is None else runs(model, fed)
        if fed is not None and with_others is not None and all(map(_is_tame, with_others)):
            found.append((fed, with_others))
    return found


def _is_tame(array: Any) -> bool:
    return bool(array.size) and (array.dtype.kind != "f" or bool(np.isfinite(array).all()))


def _at(
    model: onnx.ModelProto, feeds: Feeds, named: Mapping[str, int], random: np.random.Generator
) -> dict[str, Array] | None:
    """Feeds at other sizes of the dynamic axes; None where an input has none."""
    found: dict[str, Array] = {}
    for value in model.graph.input:
        if value.name in feeds:
            dims = value.type.tensor_type.shape.dim
            shape = sizes([size.dim_param or size.dim_value for size in dims], named)
            given = feeds[value.name]
            found[value.name] = (random.standard_normal(shape) if given.dtype.kind == "f"
                                 else random.integers(0, 2, shape)).astype(given.dtype)  # fmt: skip
    return found if any(array.shape != feeds[name].shape for name, array in found.items()) else None


def _assert_same(model: onnx.ModelProto, written: onnx.ModelProto, expected: Expected) -> None:
    step = _largest_step(model)
    for level in LEVELS:
        made = session(written, level)
        for feeds, outputs in expected:
            found = made.run(None, dict(feeds))
            for output, a, b in zip(model.graph.output, outputs, found, strict=True):
                where = f"{output.name} at {level}"
                assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{where}: {b.dtype} {b.shape}, not {a.dtype} {a.shape}"
                if a.dtype.kind != "f":
                    moved = np.abs(a.astype(int) - b.astype(int)).max(initial=0)
                    assert moved <= (step > 0) or _is_broken(model, step), where
                    continue
                largest, distance = float(np.abs(a).max(initial=0)), float(np.abs(a - b).max(initial=0))
                least = 1e-2 if _is_short(model) else 1e-4
                within = distance <= least * largest + 1e-6 + step * max(1.0, largest)
                assert within or _is_broken(model, step), f"{where}: {distance} of {largest}"


def _is_short(model: onnx.ModelProto) -> bool:
    return any(attribute.i == onnx.TensorProto.FLOAT16 for node in model.graph.node for attribute in node.attribute
               if node.op_type == "Cast")  # fmt: skip


_CHOOSES = {"Hardmax", "ArgMax", "ArgMin", "TopK", "Greater", "Less", "LessOrEqual", "GreaterOrEqual", "Equal", "Floor",
            "Ceil", "Round", "Sign", "Mod", "NonZero", "Cast", "Shrink", "If"}  # fmt: skip


def _is_broken(model: onnx.ModelProto, step: float) -> bool:
    """Whether one step of rounding may be any distance further on."""
    return step > 0 and bool({node.op_type for node in model.graph.node} & _CHOOSES)


def _largest_step(model: onnx.ModelProto) -> float:
    """Of activations that are quantized: results may round to the neighbour, and further nodes make that larger."""
    kinds = [node.op_type for node in model.graph.node]
    return 0.05 * (1 + len(kinds)) if {"QuantizeLinear", "DynamicQuantizeLinear"} & set(kinds) else 0.0


def _sqnr(a: Array, b: Array) -> float:
    return sqnr(torch.from_numpy(a), torch.from_numpy(b))


os.environ["GRAPHOPT_MEASURE"] = "0"
