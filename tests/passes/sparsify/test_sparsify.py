"""sparsify: weights become zero where they matter least."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.errors import PassError, UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node
from graphopt.numerics.sparsity import Pattern, as_matrix
from graphopt.passes import Quantize, Sparsify
from graphopt.passes.sparsify.criteria import CRITERIA
from graphopt.pipeline.batches import Batch
from graphopt.pipeline.context import Context
from graphopt.pipeline.runner import Pipeline, run_pass
from graphopt.pipeline.selectors import Selector
from graphopt.pipeline.text import parse
from tests.language import FakeTarget, assert_unchanged, build, declined, declines, listing, run, stored, weight_of

TWO = "h = linear(x[2,8], W[16,8])\ny = linear(h, V[4,16]:seed7, B[4])"


def sparsity(weight: Tensor) -> float:
    """The share of zeros."""
    return float((weight == 0).double().mean())


def test_zeros_the_smallest_of_each_weight(dialect: str) -> None:
    graph = build(dialect, TWO)
    before = listing(graph)
    weights = [weight_of(site).clone() for site in graph.nodes]
    context = run(Sparsify(amount=0.25), graph)
    assert listing(graph) == before
    for site, weight in zip(graph.nodes, weights, strict=True):
        assert torch.equal(weight_of(site), weight * Pattern().masks([weight], 0.25)[0])
    assert context.record.changed == 2 and declined(context) == []
    assert_unchanged(Sparsify(amount=0.25), graph)


def test_conv_keeps_its_attributes(dialect: str) -> None:
    graph = build(dialect, "y = conv(x[1,4,6,6], W[4,2,3,3], B[4], stride=[2,2], padding=[1,1,1,1], groups=2)")
    attributes = dict(graph.nodes[0].attributes)
    run(Sparsify(amount=0.5), graph)
    assert graph.nodes[0].attributes == attributes and sparsity(weight_of(graph.nodes[0])) == 0.5


def test_global_ranks_all_weights_together(dialect: str) -> None:
    graph = build(dialect, "h = linear(x[2,2], W[2,2]:values(1,2,3,4))\ny = linear(h, V[2,2]:values(5,6,7,8))")
    context = run(Sparsify(amount=0.5, scope="global"), graph)
    first, last = graph.nodes
    assert weight_of(first).tolist() == [[0, 0], [0, 0]] and weight_of(last).tolist() == [[5, 6], [7, 8]]
    assert declines(context) == [Decline("nothing_to_zero", count=0, total=4)]
    assert_unchanged(Sparsify(amount=0.5, scope="global"), graph)


def test_declines_with_numbers(dialect: str) -> None:
    graph = build(dialect, "h = linear(x[2,3], W[2,3])\ny = linear(h, V[2,2]:values(0,0,0,9))\nreturn h, y")
    context = run(Sparsify(amount=0.05), graph)
    assert declines(context) == [Decline("nothing_to_zero", count=0, total=total) for total in (6, 4)]
    context = run(Sparsify(amount=0.5), graph)
    assert declines(context) == [Decline("zero_already", count=2, total=4)]


def test_declines_what_is_no_stored_float_weight(dialect: str) -> None:
    graph = build(
        dialect,
        """
        computed = linear(x[2,8], w[8,8])
        quantized = linear(x, dequantize(W[8,8]:int8:values(1,2,3), S[8]:ones, axis=0))
        return computed, quantized
        """,
    )
    assert declined(run(Sparsify(), graph)) == ["weight_computed", "already_quantized"]


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_pattern_that_matches_all_prunes_linears_and_convs_only(dialect: str, scope: Any) -> None:
    text = "h = linear(x[2,8], W[8,8])\nn = layer_norm(h, G[8]:seed3, B[8])\ny = rms_norm(n, R[8]:seed4)"
    graph = build(dialect, text)
    norms = [weight_of(node).clone() for node in graph.nodes[1:]]
    context = run(Sparsify(targets=Selector("*"), scope=scope), graph)
    assert declines(context) == [Decline("not_linear_or_conv", op=op) for op in ("layer_norm", "rms_norm")]
    assert context.record.changed == 1 and sparsity(weight_of(graph.nodes[0])) == 0.5
    assert all(torch.equal(weight_of(node), norm) for node, norm in zip(graph.nodes[1:], norms, strict=True))


def test_only_norms_selected_leaves_the_graph(dialect: str) -> None:
    graph = build(dialect, "y = rms_norm(x[2,8], R[8]:seed4)")
    assert_unchanged(Sparsify(targets=Selector("*"), scope="global"), graph)


def test_leaves_a_tied_weight_tied(dialect: str) -> None:
    graph = build(dialect, "h = embedding(T[9,8], ids[2]:int64)\ny = linear(h, T)")
    context = run(Sparsify(), graph)
    reader = f"embedding {graph.sites('embedding')[0].label}"
    assert declines(context) == [
        Decline("weight_tied", reader=reader), Decline("op_without_form", op="embedding"),
    ]  # fmt: skip


def test_a_shared_weight_is_stored_once(dialect: str) -> None:
    graph = build(dialect, "a = linear(x[2,8], W[8,8])\nb = linear(a, W)")
    run(Sparsify(), graph)
    assert len(list(graph.constants())) == 1


def test_keeps_the_dtype(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,8]:float16, W[8,8]:float16)")
    run(Sparsify(), graph)
    assert weight_of(graph.nodes[0]).dtype == torch.float16


def test_nan_names_the_site(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,8], W[8,8]:values(1,nan))")
    label = graph.nodes[0].label
    with pytest.raises(PassError, match=rf"the weight of {label} has 32 of 64 values NaN"):
        run(Sparsify(), graph)


# --- patterns ------------------------------------------------------------------------------------------------------

BOTH = """
    c = conv(x[batch,8,6,6], W[16,4,3,3], B[16], stride=[2,2], padding=[1,1,1,1], groups=2)
    f = reshape(c, S[2]:values(-1,144):int64)
    y = linear(f, V[8,144])
"""
"""A grouped conv, whose patches overlap, into a linear."""


def images(count: int = 4, size: int = 16) -> list[Tensor]:
    """Batches for BOTH, their channels correlated and of different scales."""
    x = torch.randn(count, size, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    for channel in range(1, 8):
        x[:, :, channel] += 0.8 * x[:, :, channel - 1]
    return list(x * torch.linspace(0.3, 2, 8).reshape(8, 1, 1))


def sites_of(graph: Graph) -> list[Node]:
    return graph.sites("conv", "linear")


@pytest.mark.parametrize("criterion", ["magnitude", "random", "wanda", "sparsegpt"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2)])
def test_of_every_m_input_channels_n_stay(dialect: str, criterion: Any, n: int, m: int) -> None:
    graph = build(dialect, BOTH)
    context = run(Sparsify(pattern=f"{n}:{m}", criterion=criterion), graph, calibration=images())
    assert context.record.changed == 2
    for site in sites_of(graph):
        weight = weight_of(site).numpy()
        along = np.moveaxis(weight, 1, -1).reshape(-1, m)  # every m neighbours along the input, whatever else
        assert ((along != 0).sum(1) == n).all()


@pytest.mark.parametrize("criterion", ["magnitude", "random", "wanda"])
@pytest.mark.parametrize(("text", "rows", "columns"), [("4x1", 4, 1), ("1x4", 1, 4)])
def test_blocks_lie_along_outputs_or_inputs(
    dialect: str, criterion: Any, text: str, rows: int, columns: int
) -> None:
    graph = build(dialect, BOTH)
    run(Sparsify(pattern=text, criterion=criterion, amount=1 / 3), graph, calibration=images())
    for site in sites_of(graph):
        weight = np.moveaxis(weight_of(site).numpy(), 1, -1)
        out, inputs = weight.shape[0], weight.shape[-1]
        blocks = weight.reshape(out // rows, rows, -1, inputs // columns, columns) != 0
        whole = blocks.all((1, 4))
        assert np.array_equal(whole, blocks.any((1, 4))) and (~whole).mean() == 1 / 3


def test_declines_what_a_pattern_does_not_divide(dialect: str) -> None:
    text = "h = linear(x[2,6], W[8,6])\ny = linear(h, V[6,8])"
    graph = build(dialect, text)
    context = run(Sparsify(pattern="2:4"), graph)
    assert declines(context) == [Decline("not_divided", axis="input", size=6, multiple=4)]
    assert context.record.changed == 1
    context = run(Sparsify(pattern="4x1"), build(dialect, text))
    assert declines(context) == [Decline("not_divided", axis="output", size=6, multiple=4)]


def test_refuses_a_pattern_that_divides_no_weight(dialect: str) -> None:
    graph = build(dialect, "y = conv(x[1,3,8,8], W[8,3,3,3])")
    label = graph.nodes[0].label
    with pytest.raises(UsageError) as caught:
        run(Sparsify(pattern="2:4"), graph)
    message = f"sparsify: pattern 2:4 divides no weight ({label}: 3 along the input axis is no multiple of 4)"
    assert str(caught.value) == message


# --- criteria ------------------------------------------------------------------------------------------------------


def rows_of(x: Tensor, site: Node) -> np.ndarray[Any, Any]:
    """What a site multiplies its weight with, (groups, rows, kernel · in), by torch's own unfold."""
    if site.kind == "linear":
        return x.double().numpy()[None]
    patches = F.unfold(x.double(), 3, padding=1, stride=2)  # (N, C · 9, positions), channel by channel
    grouped = patches.reshape(len(x), 2, 4, 9, -1).permute(1, 0, 4, 3, 2)
    return grouped.reshape(2, -1, 36).numpy()


def inputs_of(graph: Graph, batches: Iterable[Tensor]) -> list[tuple[Node, np.ndarray[Any, Any]]]:
    sites = sites_of(graph)
    seen = [graph.evaluate({"x": batch}, [site.input for site in sites]) for batch in batches]
    return [(site, np.concatenate([rows_of(one, site) for one in several], 1))
            for site, several in zip(sites, zip(*seen, strict=True), strict=True)]  # fmt: skip


def test_wanda_is_the_papers_formula(dialect: str) -> None:
    """Sun et al. 2024, equation 1: |W_ij| · ‖X_j‖₂, compared within each output."""
    graph = build(dialect, BOTH)
    before = [(as_matrix(weight_of(site)).double().numpy(), x) for site, x in inputs_of(graph, images())]
    run(Sparsify(criterion="wanda", amount=0.25), graph, calibration=images())
    for (weight, x), site in zip(before, sites_of(graph), strict=True):
        norms = np.repeat(np.sqrt((x**2).sum(1)), len(weight) // len(x), 0)
        goes = np.argsort(np.abs(weight) * norms, axis=1)[:, : weight.shape[1] // 4]
        expected = weight.copy()
        np.put_along_axis(expected, goes, 0, axis=1)
        assert np.array_equal(as_matrix(weight_of(site)).double().numpy(), expected)
    assert_unchanged(Sparsify(criterion="wanda", amount=0.25), graph, calibration=images())


@pytest.mark.parametrize("options", [{"amount": 0.5}, {"pattern": "2:4"}])
def test_sparsegpt_misses_less_of_each_output_than_magnitude(dialect: str, options: dict[str, Any]) -> None:
    original, ours, theirs = (build(dialect, BOTH) for _ in range(3))
    run(Sparsify(criterion="sparsegpt", **options), ours, calibration=images())
    run(Sparsify(**options), theirs)
    for index, (site, x) in enumerate(inputs_of(original, images())):
        errors = []
        for graph in (ours, theirs):
            miss = as_matrix(weight_of(sites_of(graph)[index]) - weight_of(site)).double().numpy()
            miss = miss.reshape(len(x), -1, miss.shape[1])
            errors.append(float((x @ miss.transpose(0, 2, 1)).__pow__(2).sum()))
            assert sparsity(weight_of(sites_of(graph)[index])) == 0.5
        assert errors[0] < 0.8 * errors[1]
    assert_unchanged(Sparsify(criterion="sparsegpt", **options), ours, calibration=images())


def test_sparsegpt_and_wanda_say_what_calibration_did_not_show(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[batch,8], W[4,8])")
    label, batch = graph.nodes[0].label, torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    assert len(run(Sparsify(criterion="sparsegpt"), graph.clone(), calibration=[batch]).record.notes) == 2
    few = run(Sparsify(criterion="sparsegpt", damping=0.5), graph.clone(), calibration=[batch[:3]])
    assert "a singular covariance" in few.record.notes[0] and f"decides at {label} (0.5)" in few.record.notes[0]
    batch[:, 2:4] = 0
    for criterion in ("wanda", "sparsegpt"):
        dead = run(Sparsify(criterion=criterion), graph.clone(), calibration=[batch])
        assert f"whose weights go first: {label} (2 of 8)" in dead.record.notes[0]


def test_padding_says_nothing(dialect: str) -> None:
    text = "y = linear(x[batch,seq,4], W[2,4]:ones)\nm = cast(mask[batch,seq]:int64, dtype=float32)\nreturn y, m"
    graph = build(dialect, text)
    x = torch.tensor([[[4.0, 3, 2, 1], [0, 0, 99, 99]]])
    batch = {"x": x, "mask": torch.tensor([[1, 0]])}
    run(Sparsify(criterion="wanda"), graph, calibration=[batch])
    assert weight_of(graph.sites("linear")[0]).tolist() == [[1, 1, 0, 0]] * 2


def test_readers_of_one_weight_are_seen_together(dialect: str) -> None:
    graph = build(dialect, "a = linear(x[batch,4], W[2,4]:ones)\nb = linear(z[batch,4], W)\nreturn a, b")
    x, z = torch.tensor([[1.0, 2, 0, 0]]), torch.tensor([[0.0, 0, 3, 0.5], [0, 0, 0, 0]])
    run(Sparsify(criterion="wanda"), graph, calibration=[{"x": x.repeat(2, 1), "z": z}])
    assert weight_of(graph.nodes[0]).tolist() == weight_of(graph.nodes[1]).tolist() == [[0, 1, 1, 0]] * 2
    assert len(list(graph.constants())) == 1


def test_random_is_seeded_site_by_site(dialect: str) -> None:
    def zeros(**options: Any) -> list[Tensor]:
        graph = build(dialect, TWO)
        run(Sparsify(criterion="random", amount=0.5, **options), graph)
        return [weight_of(site) == 0 for site in graph.nodes]

    first, again, other = zeros(), zeros(), zeros(seed=1)
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in zip(first, again, other, strict=True))
    assert [float(mask.double().mean()) for mask in first] == [0.5, 0.5]
    graph = build(dialect, TWO)
    last = graph.nodes[1]
    run(Sparsify(criterion="random", targets=Selector.of(last)), graph)
    assert torch.equal(weight_of(graph.nodes[1]) == 0, first[1])


def test_threshold_is_a_share_of_the_largest(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,4], W[2,4]:values(1,-2,3,-8,4,0.5,2.5,1.9))")
    run(Sparsify(criterion="threshold", amount=0.25), graph)
    assert weight_of(graph.nodes[0]).tolist() == [[0, -2, 3, -8], [4, 0, 2.5, 0]]
    assert_unchanged(Sparsify(criterion="threshold", amount=0.25), graph)


def squared(outputs: list[Tensor], batch: Batch) -> Tensor:
    return F.mse_loss(outputs[0], batch.labels)


def by_gradient(pass_: Sparsify, graph: Graph, batches: Sequence[Mapping[str, Tensor]], loss: Any = squared) -> Context:
    from graphopt.pipeline.calibration import Calibration

    context = Context(calibration=Calibration(batches, graph.inputs), loss=loss)
    run_pass(pass_, graph, context)
    return context


@pytest.mark.parametrize("scope", ["local", "global"])
def test_gradient_is_the_first_order_change_of_the_loss(scope: Any) -> None:
    graph = build("fx", TWO.replace("x[2,8]", "x[batch,8]"))
    draw = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(3, 8, generator=draw), "target": torch.randn(3, 4, generator=draw)} for _ in range(3)]
    weights = [weight_of(site).clone().requires_grad_() for site in graph.nodes]
    bias = stored(graph.nodes[1], "bias")
    scores = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:
        y = F.linear(F.linear(batch["x"], weights[0]), weights[1], bias)
        for total, weight, found in zip(
            scores, weights, torch.autograd.grad(F.mse_loss(y, batch["target"]), weights), strict=True
        ):
            total += (weight.detach() * found).abs()
    by_gradient(Sparsify(criterion="gradient", scope=scope, amount=0.25), graph, batches)
    for site, score in zip(graph.nodes, scores, strict=True):
        ranked = torch.cat([one.flatten() for one in scores]) if scope == "global" else score.flatten()
        cut = ranked.sort().values[len(ranked) // 4]
        assert torch.equal(weight_of(site) == 0, score < cut)
    assert any(sparsity(weight_of(site)) != 0.25 for site in graph.nodes) == (scope == "global")


def test_gradient_works_on_weights_stored_the_other_way_round() -> None:
    from tests.twins.test_twins import captured

    graph, feeds = captured("gpt2", "fx").graph.clone(), captured("gpt2", "fx").feeds[0]
    weights = {site.path: weight_of(site) for site in graph.sites("linear")}
    by_gradient(Sparsify(criterion="gradient"), graph, [feeds], lambda outputs, batch: outputs[0].square().mean())
    changed = [site for site in graph.sites("linear") if not torch.equal(weight_of(site), weights[site.path])]
    assert len(changed) == 8 and all(abs(sparsity(weight_of(site)) - 0.5) < 1e-6 for site in changed)


# --- amounts by site -----------------------------------------------------------------------------------------------


def test_amounts_by_site_go_by_the_first_term_that_matches(dialect: str) -> None:
    graph = build(dialect, TWO + "\nz = linear(y, U[4,4])")
    last = Selector.of(graph.nodes[2])
    pass_ = parse(f"sparsify{{amount={{{last}=0.75 linear=0.25}}}}", {"sparsify": Sparsify}).passes[0]
    assert parse(str(pass_), {"sparsify": Sparsify}) == Pipeline([pass_]) and hash(pass_)
    run(pass_, graph)
    assert [sparsity(weight_of(site)) for site in graph.nodes] == [0.25, 0.25, 0.75]
    graph = build(dialect, TWO)
    context = run(Sparsify(amount={str(Selector.of(graph.nodes[0])): 0.5}), graph)
    assert declined(context) == ["no_amount"] and context.record.changed == 1


def test_amounts_that_contradict_each_other_on_one_weight(dialect: str) -> None:
    graph = build(dialect, "a = linear(x[2,8], W[8,8])\nb = linear(a, W)")
    context = run(Sparsify(amount={str(Selector.of(graph.nodes[0])): 0.25, "linear": 0.5}), graph)
    assert declines(context) == [Decline("amounts_differ", amounts="0.25 or 0.5")] * 2


def test_a_term_that_no_site_takes_is_an_error(dialect: str) -> None:
    with pytest.raises(UsageError, match="sparsify: amount: 'convv' selects none of the sites"):
        run(Sparsify(amount={"linear": 0.5, "convv": 0.5}), build(dialect, TWO))


# --- amounts by sensitivity ----------------------------------------------------------------------------------------


def test_sensitivity_spares_the_weight_that_hurts_most(dialect: str) -> None:
    """Two branches add up to the output, one of them a thousand times smaller."""
    text = """
        a = linear(x[batch,32], W[32,32])
        b = linear(x, V[32,32])
        y = add(a, mul(b, TINY[1]:values(0.001)))
    """
    graph, batches = build(dialect, text), [torch.randn(64, 32, generator=torch.Generator().manual_seed(0))]
    even = graph.clone()
    context = run(Sparsify(allocate="sensitivity"), graph, calibration=batches)
    loud, quiet = graph.sites("linear")
    assert [sparsity(weight_of(site)) for site in (loud, quiet)] == pytest.approx([0.25, 0.75], abs=1e-3)
    assert context.record.notes[0].startswith("amounts by sensitivity, 0.5 in all: from 0.25 (")
    found = context.record.sensitivity
    assert found is not None and {row.setting for row in found.rows} == {
        "sparsify{amount=0.25}", "sparsify{amount=0.5}", "sparsify{amount=0.75}"
    }  # fmt: skip
    expected = even.evaluate({"x": batches[0]}, even.outputs)[0]
    run(Sparsify(), even)
    errors = [(g.evaluate({"x": batches[0]}, g.outputs)[0] - expected).norm() for g in (graph, even)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("options", [{}, {"amount": 0.8}, {"pattern": "4x1"}, {"criterion": "sparsegpt"}])
def test_sensitivity_keeps_the_total(dialect: str, options: dict[str, Any]) -> None:
    graph = build(dialect, BOTH)
    run(Sparsify(allocate="sensitivity", **options), graph, calibration=images())
    weights = [weight_of(site) for site in sites_of(graph)]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert zeros == pytest.approx(options.get("amount", 0.5), abs=0.02)


def test_sensitivity_needs_calibration(dialect: str) -> None:
    with pytest.raises(UsageError, match="needs calibration data"):
        run(Sparsify(allocate="sensitivity"), build(dialect, TWO))


# --- with others ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_quantize_keeps_zeros(dialect: str, scheme: Any) -> None:
    graph = build(dialect, TWO.replace("x[2,8]", "x[batch,8]"))
    batches = [torch.randn(16, 8, generator=torch.Generator().manual_seed(0))]
    run(Sparsify(pattern="2:4", criterion="sparsegpt"), graph, calibration=batches)
    zeros = [weight_of(site) == 0 for site in graph.sites("linear")]
    assert run(Quantize(scheme=scheme), graph, calibration=batches).record.changed == 2
    for site, mask in zip(graph.sites("linear"), zeros, strict=True):
        dequantize = site.required("weight").producer
        assert dequantize is not None and dequantize.kind == "dequantize"
        integers = stored(dequantize, "x")
        assert integers.dtype == torch.int8 and (integers[mask] == 0).all()


def test_says_what_zeros_bring(dialect: str) -> None:
    text = "y = linear(x[2,512], W[512,512])"
    notes = run(Sparsify(pattern="2:4"), build(dialect, text)).record.notes
    assert notes[0].startswith("50.0% of 1 weights (1.05 MB) are zero; compressed they take about 5")
    assert "zlib" in notes[0] and notes[1].startswith("zeros bring speed only where kernels skip them")
    dense = run(Sparsify(pattern="2:4"), build(dialect, text), target=FakeTarget()).record.notes[1]
    assert dense.startswith("warning: 2:4 zeros make nothing faster on toy, which has no kernel for zeros (zeros are")
    able = FakeTarget(sparse=("2:4",), zeros="skipped by kernels")
    assert run(Sparsify(pattern="2:4"), build(dialect, text), target=able).record.notes[1] == "toy: skipped by kernels"
    other = run(Sparsify(pattern="1:4"), build(dialect, text), target=able).record.notes[1]
    assert "1:4 zeros make nothing faster on toy, which has kernels for 2:4 only" in other


def test_the_option_names_every_criterion() -> None:
    assert get_type_hints(Sparsify)["criterion"] == Literal[*CRITERIA]


# --- what cannot be asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_needs_calibration(dialect: str, criterion: Any) -> None:
    with pytest.raises(UsageError, match="sparsify needs calibration data: pass calibration="):
        run(Sparsify(criterion=criterion), build(dialect, TWO))
    with pytest.raises(UsageError, match="sparsify needs calibration data: pass calibration="):
        run(Sparsify(criterion=criterion), build(dialect, "y = relu(x[2,4])"))


def test_gradient_needs_a_loss_calibration_and_an_fx_graph() -> None:
    pass_ = Sparsify(criterion="gradient")
    with pytest.raises(UsageError, match="sparsify follows gradients, and an onnx graph has none"):
        run(pass_, build("onnx", TWO), calibration=[torch.zeros(2, 8)])
    with pytest.raises(UsageError, match="sparsify follows gradients, and has no loss"):
        run(pass_, build("fx", TWO), calibration=[torch.zeros(2, 8)])
    graph = build("fx", TWO)
    with pytest.raises(UsageError, match="sparsify needs calibration data"):
        run_pass(pass_, graph, Context(loss=squared))


@pytest.mark.parametrize("amount", [-0.1, 1, 1.5, "half", True, float("nan")])
def test_refuses_amounts_out_of_range(amount: Any) -> None:
    with pytest.raises(UsageError, match=rf"sparsify: amount is {amount!r}; give a number of at least 0 and below 1"):
        Sparsify(amount=amount)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "layer"}, "scope is 'layer'; give local or global"),
        ({"criterion": "taylor"}, "criterion is 'taylor'; give magnitude, movement, threshold, random, grad"),
        ({"pattern": "2/4"}, "pattern is '2/4'; give unstructured, N:M (2:4) or a block"),
        ({"pattern": 24}, "pattern is 24; give a text"),
        ({"pattern": "4:2"}, "pattern is 4:2; of every M weights N stay, with 1 <= N < M"),
        ({"amount": {"linear": 1.5}}, "amount is 1.5; give a number of at least 0 and below 1"),
        ({"amount": {"linear": None}}, "amount is None; give a number of at least 0 and below 1"),
        ({"amount": {}}, "amount is empty; give a share for at least one site"),
        ({"seed": 1.5}, "seed is 1.5; give a whole number"),
        ({"damping": 0}, "damping is 0; give a number above 0 and at most 1"),
        ({"pattern": "2:4", "amount": 0.3}, "pattern 2:4 makes 0.5 of the weights zero; leave amount out"),
        ({"pattern": "2:4", "amount": {"linear": 0.5}}, "pattern 2:4 makes 0.5 of the weights zero; leave amount out"),
        ({"criterion": "threshold"}, "threshold needs amount: the share of the largest weight"),
        ({"criterion": "threshold", "amount": 0.1, "pattern": "4x1"}, "a threshold takes weights one by one"),
        ({"criterion": "threshold", "amount": 0.1, "scope": "global"}, "threshold ranks each weight by itself"),
        ({"criterion": "wanda", "scope": "global"}, "wanda ranks each weight by itself; use scope=local"),
        ({"criterion": "sparsegpt", "scope": "global"}, "sparsegpt ranks each weight by itself"),
        ({"criterion": "sparsegpt", "pattern": "4x1"}, "sparsegpt has no blocks, and pattern is 4x1"),
        ({"scope": "global", "pattern": "2:4"}, "scope=global decides the amount of each weight, and so does pattern"),
        ({"scope": "global", "amount": {"linear": 0.5}}, "scope=global decides the amount of each weight, and so does"),
        ({"allocate": "greedy"}, "allocate is 'greedy'; give evenly or sensitivity"),
        ({"allocate": "sensitivity", "pattern": "2:4"}, "allocate=sensitivity spreads one share of zeros"),
        ({"allocate": "sensitivity", "amount": {"linear": 0.5}}, "allocate=sensitivity spreads one share of zeros"),
        ({"allocate": "sensitivity", "amount": 0}, "allocate=sensitivity spreads one share of zeros"),
        ({"allocate": "sensitivity", "scope": "global"}, "allocate=sensitivity spreads one share of zeros"),
        (
            {"allocate": "sensitivity", "criterion": "threshold", "amount": 0.5},
            "allocate=sensitivity spreads one share of zeros",
        ),
        ({"seed": 3}, "seed is for criterion=random, and criterion is magnitude"),
        ({"criterion": "wanda", "damping": 0.1}, "damping is for criterion=sparsegpt, and criterion is wanda"),
    ],
)
def test_refuses_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Sparsify(**options)
    assert str(caught.value).startswith(f"sparsify: {message}")


def test_an_amount_that_the_pattern_says_too_is_no_contradiction() -> None:
    assert Sparsify(pattern="2:4", amount=0.5).amount == 0.5
