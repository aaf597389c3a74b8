"""The canonical ops: each declares its meaning, its FLOPs and its axes, and a declaration without them fails."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graphopt.analysis.groups import groups
from graphopt.ir.axes import elementwise
from graphopt.ir.ops import OPS, Op, op
from graphopt.ir.ops.declaration import shapes_read
from tests.language import build

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", OPS)
def test_an_op_declares_itself(name: str) -> None:
    declared = OPS[name]
    assert declared.name == name and declared.reference.__doc__
    assert declared.flops == 0 or set(shapes_read(declared.flops)) <= {*declared.operands, *declared.results}
    assert callable(declared.axes) and callable(declared.cut)
    assert (ROOT / "graphopt/ir/ops" / f"{declared.family}.py").exists()


def test_products_alone_are_counted() -> None:
    counted = {name for name, declared in OPS.items() if declared.flops != 0}
    products = {"linear", "linear_int8", "conv", "conv_int8", "conv_transpose", "matmul", "attention"}
    assert counted == {*products, "lstm", "gru", "rnn"}


def test_contributing_says_how_many_there_are() -> None:
    told = re.search(r"There are (\d+) ops", (ROOT / "CONTRIBUTING.md").read_text())
    assert told is not None and int(told[1]) == len(OPS)


def cube(x: Tensor, other: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
    """x³ · scale."""
    return x**3 * scale


def test_flops_and_axes_are_required() -> None:
    with pytest.raises(TypeError, match="'flops' and 'axes'"):
        op()(cube)  # type: ignore[call-arg]
    assert "cube" not in OPS


def test_flops_read_shapes_that_the_op_has() -> None:
    with pytest.raises(TypeError, match="the FLOPs of cube read weight: no operand and no result"):
        op(flops=lambda x, weight: 1, axes=elementwise)(cube)
    assert "cube" not in OPS


def test_a_signature_is_read_from_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[str, Op] = {}
    monkeypatch.setattr("graphopt.ir.ops.declaration._OPS", registered)
    assert op(flops=lambda x, y: 2, axes=elementwise, commutative=True)(cube) is cube
    declared = registered["cube"]
    assert (declared.operands, declared.optional, declared.results) == (("x", "other"), frozenset({"other"}), ("y",))
    assert dict(declared.attributes) == {"scale": 1.0} and declared.commutative and not declared.variadic
    assert (OPS["slice"].name, OPS["concat"].names(3)) == ("slice", ("values",) * 3)  # slice_, and a variadic op


@pytest.mark.parametrize("name", ["sub", "div", "pow", "sqrt", "rsqrt", "reciprocal", "exp", "erf", "tanh", "sigmoid"])
def test_arithmetic_means_what_torch_means(name: str) -> None:
    declared = OPS[name]
    operands = [torch.rand(3, generator=torch.Generator().manual_seed(seed)) + 0.5 for seed in (1, 2)]
    given = operands[: len(declared.operands)]
    assert torch.equal(declared.reference(*given), getattr(torch, name)(*given))


def test_an_op_that_locks_says_so() -> None:
    graph = build(
        "onnx",
        "q = linear_int8(x[2,4]:uint8, S[]:ones, Z[]:zeros:uint8, A[6,4]:int8, T[6]:ones)\ny = linear(q, B[3,6])",
    )
    lock = groups(graph)[0].locked
    assert lock is not None and lock.code in ("axis_at_a_fixed_op", "axis_of_output")
