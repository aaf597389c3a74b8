"""Linears over flattened rows, as GPT-2's Conv1D has them, and what torch's exporter makes of split."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import graphopt
from graphopt.capture.sources import capture
from graphopt.dialects.raising import raise_flattened_linears
from tests.language import build, outputs


class Block(nn.Module):
    """Queries, keys and values of one product over flattened rows, heads, and a product over heads joined again."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(24, 8), Conv1D(8, 8)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.c_attn(x).split(8, dim=2)
        )
        y = nn.functional.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.c_proj(y.transpose(1, 2).reshape(x.shape))
        return result


def test_linears_read_rows_as_they_are_and_parts_come_of_one_split() -> None:
    torch.manual_seed(0)
    module, x = Block().eval(), torch.randn(3, 5, 8)
    result = graphopt.optimize(module, example_inputs=x, dynamic_shapes={"x": {0: "batch", 1: "seq"}})
    kinds = [node.kind for node in result.lowered.nodes]
    assert kinds.count("onnx.Split") == 1 and kinds.count("linear") == 2
    assert not {"onnx.SequenceAt", "onnx.SplitToSequence", "transpose"} & set(kinds)
    (attention,) = result.lowered.sites("attention")
    assert attention.attributes["heads"] == 2
    torch.testing.assert_close(result(x), module(x), rtol=1e-5, atol=1e-6)
    longer = torch.randn(2, 7, 8)
    torch.testing.assert_close(result(longer), module(longer), rtol=1e-5, atol=1e-6)


def test_linears_of_either_dialect_read_rows_as_they_are(dialect: str) -> None:
    torch.manual_seed(0)
    module, x = Block().eval(), torch.randn(3, 5, 8)
    graph = capture(module, dialect, example_inputs=x, dynamic_shapes={"x": {0: "batch", 1: "seq"}}).graph
    shapes = [node.input.shape for node in graph.sites("linear")]
    assert shapes == [("batch", "seq", 8)] * 2
    longer = torch.randn(2, 7, 8)
    torch.testing.assert_close(outputs(graph, {"x": longer}), [module(longer)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "result", "changes"),
    [((24, 8), (6, 4, 5), True), ((48, 4), (4, 12, 5), True), ((24, 8), (20, 6), False), ((24, 8), (4, 30), False)],
    ids=["other leading axes", "halves of rows", "outputs regrouped", "outputs joined"],
)
def test_rows_that_are_cut_up_otherwise(
    dialect: str, rows: tuple[int, ...], result: tuple[int, ...], changes: bool
) -> None:
    graph = build(dialect, f"""
        f = reshape(x[4,6,8], F[2]:values{rows}:int64)
        h = linear(f, W[5,{rows[1]}])
        y = reshape(h, S[{len(result)}]:values{result}:int64)""".replace(", ", ",").replace("8],", "8], "))
    before = outputs(graph)
    (log,) = raise_flattened_linears(graph).values()
    graph.sweep()
    declines = [] if changes else ["linear_rows_regrouped"]
    assert [decline.code for decline in log.declined.values()] == declines
    assert [node.kind for node in graph.nodes] == ["reshape", "linear", *(() if changes else ("reshape",))]
    torch.testing.assert_close(outputs(graph), before)
