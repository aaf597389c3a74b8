"""The same pass on the fx and the onnx capture of one module: the same sites, and the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture.sources import Captured, capture
from graphopt.ir.graph import Graph, Node, Value
from graphopt.numerics.metrics import within_tolerance
from graphopt.passes import FoldInt8, LowRank, MergeLinear, Quantize, Simplify, Smooth, Sparsify
from graphopt.pipeline.calibration import Calibration, S
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.selectors import Selector
from tests import models
from tests.language import BITS, outputs, run

MODELS: Mapping[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "bert": (models.bert, {"input_ids": models.tokens(), "attention_mask": models.padding()}),
    "gpt2": (models.gpt2, {"input_ids": models.tokens()}),
    "decoder": (lambda: models.seeded(models.Decoder), {"ids": models.tokens()}),
    "convs": (lambda: models.seeded(models.ConvNet), {"x": models.images()}),
}


@cache
def captured(name: str, dialect: str) -> Captured:
    """A seeded model in one dialect, simplified."""
    make, example = MODELS[name]
    found = capture(make(), dialect, example_inputs=example)
    run(Simplify(), found.graph)
    return found


def twins(name: str, *passes: Pass, calibration: object = None) -> tuple[Graph, Graph]:
    """Both captures after the passes."""
    graphs = tuple(captured(name, dialect).graph.clone() for dialect in ("fx", "onnx"))
    for graph in graphs:
        changes = [run(pass_, graph, calibration=calibration).record.changes for pass_ in passes]
        assert not passes or changes[0] > 0
    return graphs[0], graphs[1]


def constants(graph: Graph) -> list[tuple[str, str, list[Tensor]]]:
    """Path, op and constants of every site with a weight or int8 form, in an order that both dialects have."""
    found = []
    for site in graph.sites("linear", "conv", "linear_int8", "conv_int8", "add_int8", "quantize"):
        tensors = [tensor for value in site.operands if value for tensor in constants_of(graph, value)]
        found.append((site.path, site.kind, tensors))
    return sorted(
        found, key=lambda entry: (*entry[:2], [(*tensor.shape, *tensor.flatten()[:1]) for tensor in entry[2]])
    )


def constants_of(graph: Graph, value: Value) -> list[Tensor]:
    """The constant itself, or those behind the dequantize that makes a value."""
    tensor = graph.constant(value)
    if tensor is not None:
        return [tensor]
    maker = value.producer
    if maker is None or maker.kind != "dequantize":
        return []
    # Not the zero point: fx leaves out one that is 0. Both dialects show it on the quantize.
    return [tensor for operand in maker.operands[:2] if operand and (tensor := graph.constant(operand)) is not None]


def assert_twins(pair: tuple[Graph, Graph], *, scales: float = 0.0) -> None:
    """Equal paths, ops and constants: to the bit, but that single floats may differ by `scales`, relative."""
    fx, onnx = (constants(graph) for graph in pair)
    assert [entry[:2] for entry in fx] == [entry[:2] for entry in onnx]
    for (path, _, ours), (_, _, theirs) in zip(fx, onnx, strict=True):
        assert len(ours) == len(theirs), path
        for a, b in zip(ours, theirs, strict=True):
            rtol = scales if a.is_floating_point() and a.dim() == 0 else 0
            assert a.dtype == b.dtype and torch.allclose(a, b, rtol=rtol, atol=0), path


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "passes",
    [
        [],
        [Sparsify(amount=0.5)],
        [Sparsify(amount=0.3, scope="global")],
        [LowRank(rank=0.25)],
        [LowRank(energy=0.5)],
        [Quantize(scheme="dynamic", targets=Selector("linear"))],
        [Quantize(scheme="dynamic", bits=BITS, targets=Selector("linear")), MergeLinear(), FoldInt8()],
    ],
    ids=lambda passes: ",".join(map(str, passes)) or "simplify",
)
def test_passes_over_weights_are_equal_to_the_bit(name: str, passes: Sequence[Pass]) -> None:
    pair = twins(name, *passes)
    assert_twins(pair)
    example = captured(name, "fx").feeds[0]
    for ours, theirs in zip(*(outputs(graph, example) for graph in pair), strict=True):
        assert within_tolerance(ours, theirs, rtol=0.05 if any(not p.lossless for p in passes) else 1e-5)


class Recorded(Calibration):
    """What one dialect saw, given to the other: by the path and the side of the site that a value belongs to."""

    def __init__(self, graph: Graph, feeds: Mapping[str, Tensor]) -> None:
        super().__init__([feeds], graph.inputs)
        self.seen: dict[object, Any] = {}

    def observe(self, graph: Graph, wanted: Iterable[tuple[Value, S]]) -> Iterator[S]:
        pairs = list(wanted)
        keys = [(key(value), type(kept), getattr(kept, "conv", None)) for value, kept in pairs]
        fresh = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self.seen}
        self.seen |= dict(zip(fresh, super().observe(graph, fresh.values()), strict=True))
        return iter([self.seen[one] for one in keys])


def key(value: Value) -> tuple[str, ...]:
    """What a value is called in both dialects: where it is made, and by which sites it is read."""

    def paths(nodes: Sequence[Node]) -> list[str]:
        return sorted(node.path for node in nodes if node.kind in ("linear", "conv", "add", "relu"))

    made = () if value.producer is None else paths([value.producer])
    return (*made, "to", *paths(value.users))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("folded", [False, True])
def test_calibrated_passes_are_equal_to_the_bit(name: str, folded: bool) -> None:
    recorded = Recorded(captured(name, "fx").graph, captured(name, "fx").feeds[0])
    lowering = [MergeLinear(), FoldInt8()] if folded else []
    assert_twins(twins(name, Quantize(scheme="static"), *lowering, calibration=recorded))


@pytest.mark.parametrize("name", MODELS)
def test_second_order_rounding_and_corrected_biases_are_equal_to_the_bit(name: str) -> None:
    """Fed one recorded set of statistics; and both have changed something."""
    recorded = Recorded(captured(name, "fx").graph, captured(name, "fx").feeds[0])
    passes = (Quantize(scheme="static", rounding="gptq", bias_correction=True),
              Quantize(scheme="static", rounding="nearest", bias_correction=False))  # fmt: skip
    calibrated, nearest = (twins(name, one, calibration=recorded) for one in passes)
    assert_twins(calibrated)
    held = [[one for _, _, tensors in constants(graph) for one in tensors] for graph in (calibrated[1], nearest[1])]
    integers, floats = ([[one for one in tensors if one.is_floating_point() is floating and one.dim() > 0]
                         for tensors in held] for floating in (False, True))  # fmt: skip
    for ours, theirs in (integers, floats):  # biases came in, or moved; weights' scales did not
        assert not all(any(torch.equal(a, b) for b in theirs) for a in ours)


@pytest.mark.parametrize("name", MODELS)
def test_statistics_of_each_dialect_agree(name: str) -> None:
    nearest = Quantize(scheme="static", rounding="nearest", bias_correction=False, smooth=False)
    pair = twins(name, nearest, calibration=[captured(name, "fx").feeds[0]])
    assert_twins(pair, scales=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "decoder", "convs"])
def test_factors_of_each_dialect_agree(name: str) -> None:
    """Behind `smooth`, whose factors come from ranges and second moments: sites, shares of alpha and scales."""
    nearest = Quantize(scheme="static", rounding="nearest", bias_correction=False, smooth=False)
    pair = twins(name, Smooth(), nearest, calibration=[captured(name, "fx").feeds[0]])
    fx, onnx = (constants(graph) for graph in pair)
    assert [entry[:2] for entry in fx] == [entry[:2] for entry in onnx]
    for (path, _, ours), (_, _, theirs) in zip(fx, onnx, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=0 if a.is_floating_point() else 1, msg=path)
