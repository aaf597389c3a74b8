"""quantize: where a target wants integers only where they are read, it finds them there and nowhere else."""

import pytest
import torch
from torch import Tensor

from graphopt.ir.graph import Graph
from graphopt.passes import Quantize
from graphopt.pipeline.context import Context
from graphopt.pipeline.selectors import Selector
from graphopt.pipeline.target import Placement
from tests.language import FakeTarget, assert_outputs_equal, build, declined, declines, feeds, run, stored

STATIC = dict.fromkeys(("linear", "conv", "matmul", "add"), ("static",))
RESIDUAL = """
    h = relu(conv(x[1,4,6,6], V[4,4,3,3], B[4], padding=[1,1,1,1]))
    c = conv(h, W[4,4,3,3], padding=[1,1,1,1])
    y = conv(relu(add(c, h)), U[2,4,1,1])
    """
PROJECTED = """
    h = relu(conv(x[1,4,6,6], V[4,4,3,3], padding=[1,1,1,1]))
    c = conv(h, W[4,4,3,3], padding=[1,1,1,1])
    p = conv(h, P[4,4,1,1])
    y = conv(relu(add(c, p)), U[2,4,1,1])
    """


def quantized(graph: Graph, placement: Placement, pass_: Quantize | None = None) -> Context:
    target, batches = FakeTarget(schemes=STATIC, placement=placement), [feeds(graph, seed) for seed in range(2)]
    return run(pass_ or Quantize(observer="minmax"), graph, target=target, calibration=batches)


def kinds(graph: Graph) -> list[str]:
    """The ops of a graph in order, the dequantizes of weights aside."""
    return [node.kind for node in graph.nodes if not (node.kind == "dequantize" and node.required("x").is_constant)]


PAIR = ["quantize", "dequantize"]


@pytest.mark.parametrize(
    ("text", "fuses_sum", "expected"),
    [
        (RESIDUAL, False, [*PAIR, "conv", "relu", *PAIR, "conv", *PAIR, "add", "relu", *PAIR, "conv"]),
        (RESIDUAL, True, [*PAIR, "conv", "relu", *PAIR, "conv", "add", "relu", *PAIR, "conv"]),
        (PROJECTED, False, [*PAIR, "conv", "relu", *PAIR, "conv", "conv", *PAIR, *PAIR, "add", "relu", *PAIR, "conv"]),
        (PROJECTED, True, [*PAIR, "conv", "relu", *PAIR, "conv", "conv", *PAIR, "add", "relu", *PAIR, "conv"]),
    ],
    ids=["residual", "residual-fused", "projected", "projected-fused"],
)
def test_only_what_is_read_in_integers_is_quantized(
    dialect: str, text: str, fuses_sum: bool, expected: list[str]
) -> None:
    """One pair a value, however many read it; none behind a conv whose relu or sum follows."""
    graph = build(dialect, text)
    original = graph.clone()
    context = quantized(graph, Placement(fuses_sum=fuses_sum))
    assert kinds(graph) == expected and declined(context) == []
    assert_outputs_equal(graph, original, rtol=0.05)


def test_a_fused_sum_reads_the_last_conv_as_it_is(dialect: str) -> None:
    graph = build(dialect, PROJECTED)
    quantized(graph, Placement(fuses_sum=True))
    (add,) = graph.sites("add")
    makers = [value.producer.kind for value in add.operands if value is not None and value.producer is not None]
    assert makers == ["dequantize", "conv"]


@pytest.mark.parametrize("signed", [False, True])
def test_integers_are_as_the_target_wants_them(dialect: str, signed: bool) -> None:
    graph = build(dialect, "y = linear(x[3,8], W[4,8], B[4])")
    batch: dict[str, Tensor] = {"x": torch.tensor([[-0.5, 2.54]]).repeat(3, 4)}
    target = FakeTarget(schemes=STATIC, placement=Placement(signed=signed))
    run(Quantize(observer="minmax"), graph, target=target, calibration=[batch])
    (quantize,) = graph.sites("quantize")
    scale, zero_point = stored(quantize, "scale"), quantize.operand("zero_point")
    number = 0 if zero_point is None else int(stored(quantize, "zero_point"))
    if signed:
        assert (quantize.result.dtype, number) == (torch.int8, 0)
        torch.testing.assert_close(scale, torch.tensor(2.54 / 127))
    else:
        assert (quantize.result.dtype, number) == (torch.uint8, round(0.5 / (3.04 / 255)))
        torch.testing.assert_close(scale, torch.tensor(3.04 / 255))


def test_adds_that_stay_float_have_their_reasons(dialect: str) -> None:
    graph = build(dialect, "y = add(conv(x[1,4,6,6], W[4,4,1,1]), C[4,6,6])")
    (decline,) = declines(quantized(graph, Placement()))
    assert decline.code == "side_stored" and decline.values["value"].lower() == "c"
    graph = build(dialect, RESIDUAL)
    ignoring = Quantize(observer="minmax", ignore=Selector("add"))
    assert declined(quantized(graph, Placement(), ignoring)) == ["ignored"]
    assert kinds(graph)[kinds(graph).index("add") - 1] == "conv"


POOLED = """
    m = max_pool(relu(conv(x[1,4,8,8], V[4,4,3,3], B[4], padding=[1,1,1,1])), kernel=[2,2], stride=[2,2])
    c = conv(m, W[8,4,1,1])
    y = linear(mean(c, axes=[2,3], keepdim=False), T[5,8])
    """


def test_pools_compute_in_integers_where_the_target_has_that(dialect: str) -> None:
    graph = build(dialect, POOLED)
    original = graph.clone()
    target = FakeTarget(schemes=STATIC | {"max_pool": ("static",), "mean": ("static",)}, placement=Placement())
    context = run(Quantize(observer="minmax"), graph, target=target, calibration=[feeds(graph, s) for s in range(2)])
    expected = [*PAIR, "conv", "relu", *PAIR, "max_pool", *PAIR, "conv", *PAIR, "mean", *PAIR, "linear"]
    assert kinds(graph) == expected and declined(context) == []
    assert_outputs_equal(graph, original, rtol=0.05)
    before, behind = graph.sites("quantize")[1:3]
    assert torch.equal(stored(before, "scale"), stored(behind, "scale"))  # the largest numbers stay as they are
    graph = build(dialect, POOLED)
    quantized(graph, Placement())
    assert kinds(graph) == [*PAIR, "conv", "relu", "max_pool", *PAIR, "conv", "mean", *PAIR, "linear"]


def test_two_activations_are_multiplied_in_integers(dialect: str) -> None:
    graph = build(dialect, "y = matmul(a[2,3,8], b[2,8,5])")
    quantized(graph, Placement(), Quantize(observer="minmax", targets=Selector("matmul")))
    assert kinds(graph) == [*PAIR, *PAIR, "matmul"]


def test_a_second_run_changes_nothing(dialect: str) -> None:
    graph = build(dialect, RESIDUAL)
    quantized(graph, Placement(signed=True, fuses_sum=True))
    before = graph.text()
    quantized(graph, Placement(signed=True, fuses_sum=True))
    assert graph.text() == before
