"""Residual branches are found by structure, in both dialects; what is none, or cannot go, is said."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.analysis.branches import WEIGHTED, Branch, branches
from graphopt.capture.sources import capture
from graphopt.ir.graph import Graph
from tests.language import build, listing, outputs
from tests.models import seeded

PRE_NORM = """
h = add(x[batch,8], linear(gelu(linear(layer_norm(x, G[8]), W[16,8])), V[8,16]))
y = add(h, linear(relu(linear(layer_norm(h, H[8]), A[16,8])), C[8,16]))
"""
POST_NORM = """
h = layer_norm(add(linear(gelu(linear(x[batch,8], W[16,8])), V[8,16]), x), G[8])
y = layer_norm(add(linear(relu(linear(h, A[16,8])), C[8,16]), h), H[8])
"""
CONVS = """
x = relu(conv(i[batch,3,8,8], S[4,3,3,3], padding=[1,1,1,1]))
h = relu(add(conv(relu(conv(x, W[4,4,3,3], padding=[1,1,1,1])), V[4,4,3,3], padding=[1,1,1,1]), x))
y = conv(h, O[2,4,1,1])
"""
PARALLEL = """
n = layer_norm(x[batch,8], G[8])
h = add(x, linear(relu(linear(n, W[16,8])), V[8,16]))
y = add(h, linear(n, A[8,8]))
"""


def found(dialect: str, text: str) -> tuple[Graph, list[Branch]]:
    graph = build(dialect, text)
    return graph, branches(graph)


def kinds(branch: Branch) -> list[str]:
    return [node.kind for node in branch.nodes]


@pytest.mark.parametrize(("text", "inside"), [
    (PRE_NORM, [["layer_norm", "linear", "gelu", "linear"], ["layer_norm", "linear", "relu", "linear"]]),
    (POST_NORM, [["linear", "gelu", "linear"], ["linear", "relu", "linear"]]),
    (CONVS, [["conv", "relu", "conv"]]),
    (PARALLEL, [["linear", "relu", "linear"], ["linear"]]),  # the norm is read by both
], ids=["pre-norm", "post-norm", "convs", "parallel"])  # fmt: skip
def test_finds_what_is_added_to_what_it_reads(dialect: str, text: str, inside: list[list[str]]) -> None:
    _, several = found(dialect, text)
    assert [kinds(branch) for branch in several] == inside
    assert [branch.locked for branch in several] == [None] * len(inside)
    assert [branch.name for branch in several] == [branch.sites[-1].label for branch in several]
    assert all(branch.sites == tuple(node for node in branch.nodes if node.kind in WEIGHTED) for branch in several)


def test_branches_of_one_sum_are_one(dialect: str) -> None:
    graph, (branch,) = found(dialect, """
        x = relu(i[batch,8])
        n = layer_norm(x, G[8])
        y = add(add(linear(relu(linear(n, W[16,8])), V[8,16]), linear(n, A[8,8])), x)
    """)
    assert kinds(branch) == ["layer_norm", "linear", "relu", "linear", "linear", "add"] and branch.locked is None
    assert branch.shortcut == graph.nodes[0].result


def test_of_branches_in_a_branch_the_inner_ones_are_given(dialect: str) -> None:
    _, several = found(dialect, """
        s = relu(conv(i[2,3,4,4], S[4,3,1,1]))
        a = add(s, conv(relu(conv(s, W[4,4,1,1])), V[4,4,1,1]))
        y = relu(add(s, conv(a, O[4,4,1,1])))
    """)
    assert [kinds(branch) for branch in several] == [["conv", "relu", "conv"]]


@pytest.mark.parametrize("text", [
    "y = add(x[2,4], mul(x, mul(x, x)))",
    "y = add(linear(x[2,4], W[4,4]), B[4])",
    "y = add(linear(x[2,4], W[4,4]), z[2,4])",
    "h = matmul(linear(x[1,2,4], W[4,4]), transpose(linear(x, V[4,4]), perm=[0,2,1]))\ny = add(h, m[1,2,2])",
], ids=["no weight", "a bias", "two inputs", "scores and a mask"])  # fmt: skip
def test_other_sums_add_no_branch(dialect: str, text: str) -> None:
    assert not found(dialect, text)[1]


@pytest.mark.parametrize(("text", "lock"), [
    ("x = relu(i[2,4])\nf = linear(x, W[4,4])\ny = relu(add(x, f))\nreturn y, f", "branch_read_elsewhere"),
    ("x = relu(i[2,4])\nf = linear(x, W[4,4])\ny = mul(add(x, f), f)", "branch_read_elsewhere"),
    ("x = relu(i[2,4])\nf = linear(x, W[4,4])\ny = mul(add(x, relu(f)), silu(f))", "branch_read_elsewhere"),
    ("x = relu(i[1,4])\ny = relu(add(x, mul(linear(x, W[4,4]), o[3,4])))", "shortcut_differs"),
    ("y = add(x[2,4], linear(x, W[4,4]))", "shortcut_returned"),
    ("x = relu(i[2,4])\ny = add(x, linear(x, W[4,4]))\nreturn x, y", "shortcut_returned"),
    ("x = relu(i[2,4])\ny = add(linear(x, W[3,4]), linear(relu(linear(x, V[8,4])), U[3,8]))", "shortcut_not_identity"),
])  # fmt: skip
def test_what_cannot_go_is_locked(dialect: str, text: str, lock: str) -> None:
    _, (branch,) = found(dialect, text)
    assert branch.locked is not None and branch.locked.code == lock


def test_a_sum_of_another_dtype_is_locked() -> None:
    _, (branch,) = found("fx", "x = relu(i[2,4])\ny = relu(add(x, cast(linear(x, W[4,4]), dtype=float64)))")
    assert branch.locked is not None and branch.locked.code == "shortcut_differs"


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        result: Tensor = x + self.linear(F.dropout(x, training=True))
        return result.relu()


def test_what_draws_at_random_is_locked() -> None:
    (branch,) = branches(capture(seeded(Noisy), "fx", example_inputs=torch.ones(2, 4)).graph)
    assert branch.locked is not None and branch.locked.code == "branch_not_pure"


def test_what_two_branches_read_stays_for_the_other(dialect: str) -> None:
    graph, (first, _) = found(dialect, PARALLEL)
    first.remove(graph)
    assert listing(graph) == [
        "%0 = layer_norm(x[batch,8], [8])", "%1 = linear(%0[batch,8], [8,8])", "%2 = add(x[batch,8], %1[batch,8])",
        "return %2[batch,8]",
    ]  # fmt: skip
    graph.verify()
    assert [kinds(branch) for branch in branches(graph)] == [["layer_norm", "linear"]]


STEPS = {
    "pre": "x = add(x, linear(relu(linear(layer_norm(x, G{i}[4]), W{i}[6,4])), V{i}[4,6]))",
    "post": "x = layer_norm(add(linear(relu(linear(x, W{i}[6,4])), V{i}[4,6]), x), G{i}[4])",
    "plain": "x = relu(linear(x, W{i}[4,4]))",
    "scaled": "x = add(mul(linear(x, W{i}[4,4]), S{i}[4]), x)",
}


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6), data=st.data())
def test_removing_a_branch_is_computing_without_it(steps: list[str], data: st.DataObject) -> None:
    """Of any stack of blocks: as many branches as were stacked, and without one the graph is the stack without it."""
    dialect = data.draw(st.sampled_from(["fx", "onnx"]))
    lines = [STEPS[step].format(i=index) for index, step in enumerate(steps)]
    first, last = "x = relu(i[2,4])", "y = relu(x)"
    graph, several = found(dialect, "\n".join([first, *lines, last]))
    residual = [index for index, step in enumerate(steps) if step != "plain"]
    assert len(several) == len(residual) and not any(branch.locked for branch in several)
    if not residual:
        return
    place = data.draw(st.integers(0, len(residual) - 1))
    index = residual[place]
    several[place].remove(graph)
    graph.verify()
    lines[index] = f"x = layer_norm(x, G{index}[4])" if steps[index] == "post" else ""
    expected = build(dialect, "\n".join([first, *lines, last]))
    assert listing(graph) == listing(expected)
    assert torch.equal(outputs(graph)[0], outputs(expected)[0])
    assert len(branches(graph)) == len(residual) - 1
