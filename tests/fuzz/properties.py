"""What must hold of every model: each property is a function that raises AssertionError where it does not."""

from __future__ import annotations

import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import graphopt
from graphopt.analysis.groups import groups
from graphopt.backends.onnxruntime.target import OnnxRuntime
from graphopt.errors import GraphoptError, UsageError
from graphopt.ir.graph import Graph, Value, every_node
from graphopt.ir.rewrite import Choice, Rule
from graphopt.numerics.metrics import sqnr
from graphopt.passes.simplify import Simplify
from graphopt.pipeline.context import Context
from graphopt.pipeline.runner import run_pass
from tests.fuzz.onnx_graphs import SIZES, Array, read_by, runs, session, sizes

LONGEST = 300
"""Most characters of a message of graphopt."""
LEVELS = ("DISABLE_ALL", "ENABLE_ALL")

COMPARED = "compared"
references: Counter[str] = Counter()
"""How often `export_at` compared a file with the reference evaluator, and why not."""

Feeds = Mapping[str, Array]
Expected = Sequence[tuple[Feeds, list[Any]]]


def simplify_keeps_the_numbers(model: onnx.ModelProto, feeds: Feeds) -> None:
    """What is written after simplify and lowering computes what the engine computes of the model, at every level, and
    at other sizes of its dynamic axes too."""
    expected = _expected(model, feeds)
    small = graphopt.optimize(model, "simplify")
    with tempfile.TemporaryDirectory() as folder:
        _assert_same(model, onnx.load(small.export(Path(folder) / "out.onnx")), expected)


def a_second_run_computes_the_same(model: onnx.ModelProto, feeds: Feeds) -> None:
    """What is written can be read again, and what is made of that computes the same."""
    expected = _expected(model, feeds)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.onnx"
        graphopt.optimize(model, "simplify").export(path)
        again = graphopt.optimize(path, "simplify").export(Path(folder) / "again.onnx")
        _assert_same(model, onnx.load(again), expected)


def every_form_keeps_the_numbers(model: onnx.ModelProto, feeds: Feeds) -> None:
    """The same, whatever legal forms the lowering takes."""
    expected = _expected(model, feeds)
    for seed in range(2):
        with _forms_in_another_order(seed), tempfile.TemporaryDirectory() as folder:
            written = graphopt.optimize(model, "simplify").export(Path(folder) / "out.onnx")
            _assert_same(model, onnx.load(written), expected)


def export_at(opset: int, model: onnx.ModelProto, feeds: Feeds, *, portable: bool = False) -> bool:
    """At another opset the file is valid and computes the same, or is refused by name. Whether it was written.

    portable: of standard operators alone. These the reference evaluator of onnx computes too, where it does so of the
    model as it was drawn.
    """
    expected = _expected(model, feeds)
    small = graphopt.optimize(model, "simplify")
    with tempfile.TemporaryDirectory() as folder:
        try:
            written = onnx.load(small.export(Path(folder) / "out.onnx", opset=opset, portable=portable))
        except GraphoptError as error:
            assert len(str(error)) <= LONGEST, error
            names = [one.name for one in (*model.graph.node, *model.graph.output)]
            names += [node.label for node in small.folded.nodes]
            assert any(name in str(error) for name in names), f"names no node: {error}"
            return False
    assert [entry.version for entry in written.opset_import if entry.domain == ""] == [opset]
    if all(output.type.tensor_type.HasField("shape") for output in written.graph.output):
        onnx.checker.check_model(written)  # which refuses outputs of unknown rank; engines do not
    is_standard = {node.domain for node in written.graph.node} <= {"", "ai.onnx"}
    assert is_standard or not portable
    _assert_same(model, written, expected, portable=portable)
    if is_standard and (reference := _by_reference(model, feeds)) is not None:
        moved = moved_by_rounding(model, feeds, expected[0][1])
        try:
            assert_close(model, expected[0][1], reference, "the reference evaluator", moved)
        except AssertionError:
            references["computes something else of the model as it was drawn"] += 1
            return True
        again = _by_reference(written, feeds)  # it has, for one, no DequantizeLinear before opset 19
        if again is not None:
            assert_close(model, expected[0][1], again, "the reference evaluator", moved)
        references["does not run what was written" if again is None else COMPARED] += 1
    return True


def _by_reference(model: onnx.ModelProto, feeds: Feeds) -> list[Any] | None:
    """What the reference evaluator of onnx computes; None where it does not run the model, or is known to be wrong."""
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < 14 and any(node.op_type == "BatchNormalization" for node in model.graph.node):
        return None  # it takes statistics of the batch in, as if it trained
    try:
        with np.errstate(all="ignore"):
            found: Any = ReferenceEvaluator(model).run(None, dict(feeds))
    except Exception:  # of operators that it does not know, or has a fault in
        return None
    return list(found) if all(isinstance(one, np.ndarray) for one in found) else None


def a_second_pass_changes_nothing(model: onnx.ModelProto, feeds: Feeds) -> None:
    """What simplify and the lowering have no more to change: the file that they wrote, and each graph on the way."""
    small = graphopt.optimize(model, "simplify")
    graph, context = small.transformed.clone(), Context()
    run_pass(Simplify(), graph, context)
    assert context.report.passes[0].changes == 0 and graph.text() == small.transformed.text()


def torch_computes_the_same(model: onnx.ModelProto, feeds: Feeds) -> bool:
    """A model as a graph of torch.fx computes what it did, or an operator without a form there is named."""
    expected = _expected(model, feeds)
    try:
        module = graphopt.to_torch(model, {name: array.copy() for name, array in feeds.items()})
    except GraphoptError as error:
        assert len(str(error)) <= 2 * LONGEST, error
        return False
    found = module(**{name.replace(".", "_"): torch.from_numpy(array.copy()) for name, array in feeds.items()})
    outputs = [found[output.name].detach().numpy() for output in model.graph.output]
    moved = moved_by_rounding(model, feeds, expected[0][1])
    assert_close(model, expected[0][1], outputs, "torch", moved)
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
_AMPLIFIES = {
    "Log", "Reciprocal", "Div", "Pow", "Tan", "ReduceLogSum", "Exp", "Acosh", "LpNormalization", "ReduceL2", "Sqrt",
    "MeanVarianceNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization", "ReduceProd",
    "RMSNormalization", "Det", "Acos", "Asin", "Atanh", "Cosh", "Sinh", "QuantizeLinear", "DynamicQuantizeLinear",
}  # fmt: skip
"""Operators that make much of little: how much, is measured on the model itself."""
_CHOOSES = {
    "Hardmax", "ArgMax", "ArgMin", "TopK", "Greater", "Less", "LessOrEqual", "GreaterOrEqual", "Equal", "Floor", "Ceil",
    "Round", "Sign", "Mod", "NonZero", "Cast", "Shrink", "ThresholdedRelu", "IsInf", "IsNaN",
}  # fmt: skip
"""Operators that jump: an output behind one may be any other."""


def floors(passes: str, model: onnx.ModelProto, fed: Feeds, outputs: Sequence[Any]) -> list[float | None]:
    """The least SQNR in dB of each output; None of those behind an operator that jumps.

    With operators that amplify, what the model itself loses where its inputs and its weights are as noisy as the floor.
    """
    least = PASSES[passes]
    jumping = _behind_a_choice(model)
    found: list[float | None] = [None if output.name in jumping else least for output in model.graph.output]
    if least is None or not {node.op_type for node in model.graph.node} & _AMPLIFIES:
        return found
    for seed in range(2):
        given = {name: _noisy(array, least, seed) for name, array in fed.items()}
        noisy = runs(_with_noise(model, least, seed), given)
        for place, (a, b) in enumerate(zip(outputs, noisy or outputs, strict=True)):
            kept = found[place]
            if kept is not None and a.dtype == np.float32 and a.shape == b.shape:
                finite = np.isfinite(a) & np.isfinite(b)
                if finite.any():
                    found[place] = min(kept, _sqnr(a[finite], b[finite]) - _MARGIN)
    return found


_MARGIN = 6.0
"""dB. A pass adds noise at each layer, and the measured model at its ends alone."""


def _behind_a_choice(model: onnx.ModelProto) -> set[str]:
    behind: set[str] = set()
    for node in model.graph.node:
        jumps = node.op_type in _CHOOSES and not (node.op_type == "Cast" and node.attribute[0].i in _FLOATS)
        if jumps or behind & read_by(node):
            behind |= set(node.output)
    return behind


_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def _noisy(array: Array, least: float, seed: int) -> Array:
    if array.dtype != np.float32 or array.size < 2:
        return array
    size = float(np.sqrt(np.square(array).mean())) * 10 ** (-least / 20)
    noise = np.asarray(np.random.default_rng(seed).standard_normal(array.shape))
    noisy: Array = array + size * noise.astype(np.float32)
    return noisy.astype(np.float32)


def _with_noise(model: onnx.ModelProto, least: float, seed: int) -> onnx.ModelProto:
    noisy = onnx.ModelProto()
    noisy.CopyFrom(model)
    for stored in noisy.graph.initializer:
        stored.CopyFrom(numpy_helper.from_array(_noisy(numpy_helper.to_array(stored), least, seed), stored.name))
    return noisy


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
        graph = graphopt.optimize(model, "simplify").transformed
        weighted = {node.label for node in every_node(graph)
                    if node.kind in _WEIGHTED and _is_matrix(node.operands[1])}  # fmt: skip
        considered = set(record.eligible)
        if name == "prune":  # which counts groups, by their names
            found = groups(graph)
            asked = {group.name for group in found if f"{{{group.kind}=" in passes}
            assert asked <= considered, f"passed over {asked - considered}"
            considered |= {node.label for group in found for node in (*group.producers, *group.consumers)}
        assert weighted <= considered, f"passed over {weighted - considered}"
    with tempfile.TemporaryDirectory() as folder:
        written = onnx.load(small.export(Path(folder) / "out.onnx"))
    for level in LEVELS:
        for fed, outputs in expected:
            found = session(written, level).run(None, dict(fed))
            least = floors(passes, model, fed, outputs)
            for output, floor, a, b in zip(model.graph.output, least, outputs, found, strict=True):
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
    without_axes = [node for node in model.graph.node if len(node.input) + len(node.attribute) == 1]
    squeezes = any(node.op_type == "Squeeze" for node in without_axes)
    least = 2 if squeezes else 1  # without axes it would take the batch away, and products have no rank 1
    for seed, named in enumerate(({"n": 3, "s": 5}, {"n": least, "s": 2})):
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


def _assert_same(
    model: onnx.ModelProto, written: onnx.ModelProto, expected: Expected, *, portable: bool = False
) -> None:
    """portable: the engine may move what is written as far as the model, which has the same integers that saturate."""
    rounded = [moved_by_rounding(model, fed, outputs) for fed, outputs in expected]
    for level in LEVELS:
        made = session(written, level)
        for (feeds, outputs), moved in zip(expected, rounded, strict=True):
            if portable and OnnxRuntime().saturates() and _reads_integers(model):
                saturated = session(model, level).run(None, dict(feeds))
                moved = [step + float(np.abs(a.astype(float) - b.astype(float)).max(initial=0))
                         for step, a, b in zip(moved, outputs, saturated, strict=True)]  # fmt: skip
            assert_close(model, outputs, made.run(None, dict(feeds)), level, moved)


def _reads_integers(model: onnx.ModelProto) -> bool:
    return any(node.op_type == "DequantizeLinear" for node in model.graph.node)


def assert_close(
    model: onnx.ModelProto, outputs: Sequence[Any], found: Sequence[Any], where: str, moved: Sequence[float]
) -> None:
    """moved: how far each output moves by rounding alone (`moved_by_rounding`)."""
    for output, a, b, step in zip(model.graph.output, outputs, found, moved, strict=True):
        alike = (a.shape, a.dtype) == (b.shape, b.dtype)
        assert alike, f"{output.name} at {where}: {b.dtype} {b.shape}, not {a.dtype} {a.shape}"
        distance = float(np.abs(a.astype(float) - b.astype(float)).max(initial=0))
        largest = float(np.abs(a).max(initial=0)) if a.dtype.kind == "f" else 0.0
        least = 1e-2 if _is_short(model) else 1e-4
        within = distance <= least * largest + 1e-6 + 3 * step
        assert within, f"{output.name} at {where}: {distance} of {largest} (rounding moves it by {step})"


def _is_short(model: onnx.ModelProto) -> bool:
    return any(attribute.i == onnx.TensorProto.FLOAT16 for node in model.graph.node for attribute in node.attribute
               if node.op_type == "Cast")  # fmt: skip


_ROUNDS = ("QuantizeLinear", "DynamicQuantizeLinear")
_ROUNDS_RESULT = ("QLinearMatMul", "QLinearConv")


def moved_by_rounding(model: onnx.ModelProto, fed: Feeds, outputs: Sequence[Any]) -> list[float]:
    """How far each output moves where activations that are quantized round to the neighbour: 0 where none are, infinity
    where its shape becomes another. Elements that are not finite do not count.

    Each is multiplied by 1 + 0.001 sin(10000 x), or by 1 less that, before it is quantized; for an operator that
    quantizes its own result, the scale of that is multiplied by 1.001, or by 0.999.
    """
    moved = [0.0] * len(outputs)
    if not any(node.op_type in (*_ROUNDS, *_ROUNDS_RESULT) for node in model.graph.node):
        return moved
    for size in (1e-3, -1e-3):
        found = runs(_perturbed(model, size), fed)
        for place, (a, b) in enumerate(zip(outputs, found or outputs, strict=True)):
            if a.shape != b.shape:
                moved[place] = np.inf
                continue
            with np.errstate(invalid="ignore"):  # of infinity less infinity
                distance = np.abs(a.astype(float) - b.astype(float))
            moved[place] = max(moved[place], float(distance[np.isfinite(distance)].max(initial=0)))
    return moved


def _perturbed(model: onnx.ModelProto, size: float) -> onnx.ModelProto:
    perturbed = onnx.ModelProto()
    perturbed.CopyFrom(model)
    nodes = list(perturbed.graph.node)
    del perturbed.graph.node[:]
    for node in nodes:
        if node.op_type in _ROUNDS:
            name, x = f"perturbation.{node.output[0]}", node.input[0]
            for kind, inputs, result in (("Mul", [x, "perturbation.often"], "a"), ("Sin", [f"{name}.a"], "b"),
                                         ("Mul", [f"{name}.b", "perturbation.size"], "c"),
                                         ("Mul", [x, f"{name}.c"], "d"), ("Add", [x, f"{name}.d"], "e")):  # fmt: skip
                perturbed.graph.node.append(helper.make_node(kind, inputs, [f"{name}.{result}"]))
            node.input[0] = f"{name}.e"
        if node.op_type in _ROUNDS_RESULT:
            scale = f"perturbation.{node.output[0]}.scale"
            perturbed.graph.node.append(helper.make_node("Mul", [node.input[6], "perturbation.factor"], [scale]))
            node.input[6] = scale
        perturbed.graph.node.append(node)
    for stored, number in (("perturbation.often", 1e4), ("perturbation.size", size), ("perturbation.factor", 1 + size)):
        perturbed.graph.initializer.append(numpy_helper.from_array(np.array(number, np.float32), stored))
    perturbed.ir_version = max(perturbed.ir_version, 4)
    return perturbed


def _sqnr(a: Array, b: Array) -> float:
    return sqnr(torch.from_numpy(a), torch.from_numpy(b))


os.environ["GRAPHOPT_MEASURE"] = "0"
