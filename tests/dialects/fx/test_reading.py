"""Which aten calls are read as ops, and which stay opaque because they do something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.ir.ops import OPS
from tests.dialects.fx.test_graph import Lambda, X, load, normal, run

IMAGE = normal(2, 4, 9, 8)
COUNTS = torch.arange(-6, 6).reshape(3, 4)
READ: dict[str, tuple[Any, Tensor, str, dict[str, Any] | None]] = {
    "max_pool2d": (lambda m, x: F.max_pool2d(x, 2, ceil_mode=True), IMAGE,
                   "max_pool",
                   {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0, 0, 0), "dilation": (1, 1), "ceil": True}),
    "max_pool1d": (lambda m, x: F.max_pool1d(x.flatten(2), 4, 3, padding=2, dilation=2), IMAGE,
                   "max_pool", {"kernel": (4,), "stride": (3,), "padding": (2, 2), "dilation": (2,)}),
    "max_pool3d": (lambda m, x: F.max_pool3d(x[None], (1, 3, 2), 1), IMAGE,
                   "max_pool",
                   {"kernel": (1, 3, 2), "stride": (1, 1, 1), "padding": (0, 0, 0, 0, 0, 0), "dilation": (1, 1, 1)}),
    "max_pool of integers": (lambda m, x: F.max_pool2d(x.long(), 2), IMAGE,
                             "max_pool",
                             {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0, 0, 0), "dilation": (1, 1)}),
    "max_pool of one image": (lambda m, x: F.max_pool2d(x[0], 2), IMAGE, "aten.max_pool2d.default", None),
    "max_pool and its indices": (lambda m, x: F.max_pool2d(x, 2, return_indices=True), IMAGE,
                                 "aten.max_pool2d_with_indices.default", None),
    "avg_pool2d": (lambda m, x: F.avg_pool2d(x, 3, 2, 1), IMAGE,
                   "average_pool", {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1, 1, 1), "include_pad": True}),
    "avg_pool2d of what is there": (
        lambda m, x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), IMAGE,
        "average_pool", {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1, 1, 1), "ceil": True}),
    "avg_pool1d": (lambda m, x: F.avg_pool1d(x.flatten(2), 4), IMAGE,
                   "average_pool", {"kernel": (4,), "stride": (4,), "padding": (0, 0), "include_pad": True}),
    "avg_pool3d": (lambda m, x: F.avg_pool3d(x[None], (1, 3, 2)), IMAGE,
                   "average_pool",
                   {"kernel": (1, 3, 2), "stride": (1, 3, 2), "padding": (0, 0, 0, 0, 0, 0), "include_pad": True}),
    "a sum": (lambda m, x: F.avg_pool2d(x, 3, divisor_override=1), IMAGE, "aten.avg_pool2d.default", None),
    "avg_pool of integers": (lambda m, x: F.avg_pool2d(x.long(), 2), IMAGE, "aten.avg_pool2d.default", None),
    "adaptive to one": (lambda m, x: F.adaptive_avg_pool2d(x, 1), IMAGE, "mean", {"axes": (2, 3)}),
    "adaptive to one, of one image": (lambda m, x: F.adaptive_avg_pool2d(x[0], 1), IMAGE, "mean", {"axes": (1, 2)}),
    "adaptive 1d": (lambda m, x: F.adaptive_avg_pool1d(x.flatten(2), 1), IMAGE, "mean", {"axes": (2,)}),
    "adaptive 3d": (lambda m, x: F.adaptive_avg_pool3d(x[None], 1), IMAGE, "mean", {"axes": (2, 3, 4)}),
    "adaptive to more": (lambda m, x: F.adaptive_avg_pool2d(x, (1, 2)), IMAGE,
                         "aten.adaptive_avg_pool2d.default", None),
    "relu6": (lambda m, x: torch.ops.aten.relu6(x), X, "clip", {"low": 0.0, "high": 6.0}),
    "hardtanh": (lambda m, x: nn.Hardtanh(-0.5, 2, inplace=True)(x + 0), X, "clip", {"low": -0.5, "high": 2.0}),
    "clamp": (lambda m, x: x.clamp(max=1), X, "clip", {"high": 1.0}),
    "clamp_min": (lambda m, x: x.clamp_min(0.1), X, "clip", {"low": 0.1}),
    "clamp_max": (lambda m, x: x.clamp_max(0.1), X, "clip", {"high": 0.1}),
    "clamp of integers": (lambda m, x: x.clamp(-2, 3), COUNTS, "clip", {"low": -2.0, "high": 3.0}),
    "clamp that promotes": (lambda m, x: x.clamp(-2.5, 3), COUNTS, "aten.clamp.default", None),
    "clamp beyond floats": (lambda m, x: x.clamp(max=2**53 + 1), COUNTS, "aten.clamp.default", None),
    "clamp by tensors": (lambda m, x: x.clamp(m.b), X, "aten.clamp.Tensor", None),
    "leaky_relu": (lambda m, x: F.leaky_relu(x, 0.2), X, "leaky_relu", {"slope": 0.2}),
    "hardsigmoid": (lambda m, x: F.hardsigmoid(x), X, "hard_sigmoid", {}),
    "hardswish": (lambda m, x: F.hardswish(x), X, "hard_swish", {}),
    "pad": (lambda m, x: F.pad(x, (1, 2, 0, -1)), IMAGE, "pad", {"padding": (0, 0, 0, 1, 0, 0, -1, 2)}),
    "constant_pad_nd": (lambda m, x: torch.constant_pad_nd(x, (1, 0), 3), X,
                        "pad", {"padding": (0, 1, 0, 0), "value": 3.0}),
    "pad that reflects": (lambda m, x: F.pad(x, (1, 1), mode="reflect"), X, "aten.pad.default", None),
    "pad by what integers have not": (lambda m, x: F.pad(x, (1, 1), value=0.5), COUNTS, "aten.pad.default", None),
    "cat": (lambda m, x: torch.cat([x, m.b[None], x]), X, "concat", {}),
    "cat that promotes": (lambda m, x: torch.cat([x, x.double()], -1), X, "aten.cat.default", None),
    "cat of nothing": (lambda m, x: torch.cat([x, x.new_zeros(0)]), X, "aten.cat.default", None),
    "squeeze": (lambda m, x: x[:, :1].squeeze(-1), X, "squeeze", {"axes": (-1,)}),
    "squeeze of several": (lambda m, x: x[None, :, :1].squeeze((0, 2)), X, "squeeze", {"axes": (0, 2)}),
    "squeeze of what has more": (lambda m, x: x[None].squeeze((0, 1)), X, "aten.squeeze.dims", None),
    "unsqueeze": (lambda m, x: x[..., None], X, "unsqueeze", {"axes": (2,)}),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_call_is_read_as_a_op_where_both_are_equal(name: str) -> None:
    function, x, kind, attributes = READ[name]
    module = Lambda(function, None, normal(4))
    graph = load(module, x, dynamic=False)
    node = graph.nodes[-1]
    assert node.kind == kind
    if attributes is not None:
        assert dict(node.attributes) == dict(OPS[kind].attributes) | attributes
    again = graph.emit_all(node, *node.operands)[:1]
    wanted = torch.utils._pytree.tree_leaves(module(x))
    assert torch.equal(run(graph, x)[0], wanted[0])
    found = graph.evaluate({"x": x}, again)[0]
    assert found.dtype == wanted[0].dtype
    torch.testing.assert_close(found, wanted[0], rtol=1e-6, atol=1e-6)
