"""Sizes of groups by a share or by a budget, and the cost model against graphs that are really cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.analysis.groups import Group, groups
from graphopt.ir.cost import Cost
from graphopt.ir.graph import Graph
from graphopt.measure.timing import Ratio
from graphopt.passes.prune import budget, costs
from graphopt.passes.prune.budget import Candidate, Sizes, Unreachable
from graphopt.passes.prune.costs import CostModel
from tests.language import FakeTarget, build, feeds


def group(name: str, size: int, kind: str = "neurons") -> Group:
    return Group(name=name, kind=kind, size=size, axes=(), producers=(), consumers=(), reductions=(), locked=None)


def candidate(name: str, scores: list[float], round_to: int = 1) -> Candidate:
    return Candidate(group(name, len(scores)), torch.tensor(scores, dtype=torch.float64), round_to)


def even(size: int, round_to: int = 1) -> Candidate:
    return candidate(f"of{size}", [1.0] * size, round_to)


@pytest.mark.parametrize(
    ("size", "multiple"), [(64, 16), (63, 8), (32, 8), (16, 4), (12, 2), (10, 2), (7, 1), (3, 1), (1, 1)]
)
def test_a_small_group_is_cut_by_a_smaller_multiple(size: int, multiple: int) -> None:
    one = even(size, 16)
    assert one.multiple == multiple and one.sizes[0] == size
    assert all(left % multiple == 0 for left in one.sizes[1:])
    assert one.sizes == sorted(one.sizes, reverse=True) and one.sizes[-1] == min(multiple, size)


def test_what_stays_is_the_most_important_in_order() -> None:
    one = candidate("a", [3.0, 1.0, 4.0, 1.0, 5.0])
    assert one.units(3).tolist() == [0, 2, 4] and one.units(4).tolist() == [0, 2, 3, 4]  # of equals the earlier goes
    assert [round(share, 3) for share in one.shares] == [0, 0.071, 0.143, 0.357, 0.643]


def test_nearest_size_keeps_more_of_two_that_are_as_near() -> None:
    assert even(64, 16).nearest(0.5) == 32 and even(64, 16).nearest(0.3) == 48 and even(64, 16).nearest(0.1) == 64
    assert even(64, 16).nearest(0.125) == 64 and even(64, 16).nearest(0.99) == 16


def test_layer_takes_the_same_share_of_each() -> None:
    several = [even(64, 16), even(32, 8), even(100)]
    assert list(budget.by_share(several, 0.5, together=False).values()) == [32, 16, 50]


def test_global_takes_what_matters_least_of_all() -> None:
    """Shares of a group's sum are compared, so its scale does not count."""
    flat, peaked = candidate("flat", [1.0] * 8), candidate("peaked", [1e6] * 2 + [1.0] * 6)
    sizes = budget.by_share([flat, peaked], 0.375, together=True)
    assert sizes == {flat: 8, peaked: 2}
    sizes = budget.by_share([flat, peaked], 0.75, together=True)
    assert sum(sizes.values()) == 4 and sizes[peaked] == 2


def test_global_leaves_something_of_each_group() -> None:
    several = [candidate("a", [0.0] * 8), candidate("b", [1.0] * 8)]
    assert list(budget.by_share(several, 0.95, together=True).values()) == [1, 1]


def linear_cost(sizes: Sizes) -> float:
    return sum(sizes.values()) / sum(one.group.size for one in sizes)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("share", [0.9, 0.61, 0.5, 0.2])
def test_fits_a_budget_within_two_percent(share: float, together: bool) -> None:
    several = [even(64, 16), even(64, 16), even(96, 16), even(256, 16)]
    sizes = budget.fit(several, linear_cost, share, lambda one: 1.0, together)
    assert abs(linear_cost(sizes) - share) <= 0.02 * share


def test_a_budget_moves_single_groups_where_all_at_once_would_be_too_coarse() -> None:
    several = [even(64, 16) for _ in range(8)]
    sizes = budget.fit(several, linear_cost, 0.62, lambda one: 1.0, together=False)
    assert sorted(set(sizes.values())) == [32, 48] and abs(linear_cost(sizes) - 0.62) <= 0.02 * 0.62


def test_rounds_finer_only_where_it_must() -> None:
    several = [even(64, 16) for _ in range(2)]
    exact = budget.fit(several, linear_cost, 0.625, lambda one: 1.0, together=False)
    assert sorted(exact.values()) == [32, 48]
    finer = budget.fit(several, linear_cost, 0.56, lambda one: 1.0, together=False)
    assert all(size % 8 == 0 for size in finer.values()) and abs(linear_cost(finer) - 0.56) <= 0.02 * 0.56


def test_says_how_far_a_budget_could_go() -> None:
    with pytest.raises(Unreachable) as error:
        budget.fit([even(8)], lambda sizes: 0.5 + linear_cost(sizes) / 2, 0.4, lambda one: 1.0, together=False)
    assert error.value.least == 0.5625


TEXT = """
h = gelu(linear(x[batch,seq,8], W[16,8], B[16]))
y = linear(h, V[6,16], C[6])
z = linear(relu(linear(y, U[12,6])), T[5,12])
"""


def candidates(graph: Graph, round_to: int = 1) -> list[Candidate]:
    return [Candidate(one, torch.arange(one.size, dtype=torch.float64), round_to) for one in groups(graph)
            if one.locked is None]  # fmt: skip


def test_the_cost_model_counts_as_the_graph_once_cut(dialect: str) -> None:
    graph = build(dialect, TEXT)
    named = {"batch": 2, "seq": 3}
    several = candidates(graph)
    assert [one.group.size for one in several] == [16, 6, 12]
    model = CostModel(graph, several, named)
    sizes = dict(zip(several, (10, 4, 12), strict=True))
    before = Cost.of(graph, named)
    assert model.flops == before.flops == 2 * 6 * (8 * 16 + 16 * 6 + 6 * 12 + 12 * 5)
    flops, parameters = model.flops_saved(sizes), model.parameters_saved(sizes)
    share = model.share_left("params")(sizes)
    costs.cut(graph, sizes, [one.name for one in groups(graph)])
    graph.verify()
    after = Cost.of(graph, named)
    assert after.flops == 2 * 6 * (8 * 10 + 10 * 4 + 4 * 12 + 12 * 5) == model.flops - flops
    assert after.parameters == before.parameters - parameters == share * before.parameters


def test_sizes_are_those_of_a_graph_with_the_same_groups(dialect: str) -> None:
    graph = build(dialect, TEXT)
    sizes = dict.fromkeys(candidates(graph), 4)
    with pytest.raises(ValueError, match=r"sizes were chosen for 1 groups, and the graph now has \d"):
        costs.cut(graph, sizes, [groups(graph)[0].name])


def test_convs_and_attention_cost_what_they_compute(dialect: str) -> None:
    graph = build(
        dialect,
        """
        h = relu(conv(x[2,3,8,8], W[8,3,3,3], B[8], padding=[1,1,1,1]))
        y = conv(h, V[4,8,1,1], C[4])
        """,
    )
    (one,) = candidates(graph)
    model = CostModel(graph, [one], {})
    assert model.flops == 2 * 2 * 64 * (8 * 27 + 4 * 8)
    assert model.unit_cost("flops")(one) == 2 * 2 * 64 * (27 + 4) and model.unit_cost("params")(one) == 27 + 1 + 4


def test_flattened_names_have_a_number(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[batch*seq,8], W[16,8])")
    assert Cost.of(graph, {"batch": 2, "seq": 3}).flops == 2 * 6 * 8 * 16
    assert Cost.of(graph, {"batch": 2}).flops is None


def test_latency_is_measured_once_for_each_size() -> None:
    whole = build("onnx", TEXT)
    several = candidates(whole)
    seen: list[int] = []

    class Timed(FakeTarget):
        def ratios(
            self, graph: Graph, baseline: Graph, feeds: Any, *, threads: int | None = None, rounds: int = 15
        ) -> list[Ratio]:
            assert baseline is whole and threads == 2
            share = Cost.of(graph).parameters / Cost.of(baseline).parameters
            seen.append(Cost.of(graph).parameters)
            return [Ratio(1 / share**2, 0, 9, rounds, 0, {}), Ratio(1.0, 0, 9, rounds, 0, {})]

    batches: list[Mapping[str, Tensor]] = [feeds(whole), feeds(whole, batch=4)]
    cost = costs.latency_left(whole, Timed(), batches, 2)
    sizes = dict(zip(several, (8, 6, 6), strict=True))
    share = cost(sizes)
    assert cost(sizes) == share and len(seen) == 1
    assert share == pytest.approx(seen[0] / Cost.of(whole).parameters)  # the geometric mean of share² and 1
    assert Cost.of(whole).parameters != seen[0]


def test_bracket_ends_where_the_budget_lies() -> None:
    one = even(64)
    above, within = budget.bracket(budget.evenly([one]), linear_cost, 0.5)
    assert (above[one], within[one]) == (33, 32)
