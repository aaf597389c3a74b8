"""Arguments of any structure: what a module is called with, captured, called and exported, agrees with the module."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.capture.sources import Captured, capture
from graphopt.errors import CaptureError
from tests.models import seeded

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def ran(captured: Captured, *args: Any, **kwargs: Any) -> Any:
    feeds, _ = captured.signature.bind(args, kwargs)
    return captured.signature.rebuild(captured.graph.evaluate(feeds, captured.graph.outputs))


class Anything(nn.Module):
    """Adds up all tensors of all arguments, each times its place; numbers and flags scale the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Any, other: Any = None, *, extra: Any = None, **more: Any) -> dict[str, Any]:
        total, constants = self.up.bias * 0, 0
        leaves = torch.utils._pytree.tree_leaves((x, other, extra, [more[name] for name in sorted(more)]))
        for place, leaf in enumerate(leaves, 1):
            if isinstance(leaf, Tensor):
                total = total + self.up(leaf.to(torch.float32)) * place
            elif isinstance(leaf, bool | int | float):
                total, constants = total * (1 + float(leaf)), constants + 1
        return {"total": total, "more": [constants, {"text": "as it is"}], "nothing": None}


def tensors(dtype: torch.dtype) -> Tensor:
    return (torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
LEAVES = st.one_of(
    st.sampled_from(DTYPES).map(tensors),
    st.just(X),  # one tensor may be given several times
    st.just(X.numpy()),
    st.none(), st.booleans(), st.integers(-2, 2), st.sampled_from((0.5, -1.25)), st.just("a text"),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(st.sampled_from("abc"), inner, max_size=2)
    ),
    max_leaves=4,
)


@st.composite
def examples(draw: st.DrawFn) -> Any:
    """A tuple by position, or a dict by name, with names that forward does not know, and a tensor somewhere."""
    first = draw(st.one_of(st.just(X), VALUES))
    if draw(st.booleans()):
        return (first, draw(VALUES)) if draw(st.booleans()) else (first,)
    names = draw(st.lists(st.sampled_from(("other", "extra", "shift", "mask")), unique=True, max_size=3))
    return {"x": first, **{name: draw(VALUES) for name in names}}


def as_torch(value: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf,
                                        value)  # fmt: skip


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(example=examples())
def test_a_captured_module_computes_what_the_module_does_for_arguments_of_any_structure(
    dialect: str, example: Any
) -> None:
    """Or the capture is refused in one line."""
    module = seeded(Anything)
    try:
        captured = capture(module, dialect, example_inputs=example)
    except CaptureError as error:
        message = str(error)
        assert "\n" not in message and "hold no tensor" in message, message
        assert not [leaf for leaf in torch.utils._pytree.tree_leaves(example) if isinstance(leaf, Tensor | np.ndarray)]
        return
    given = as_torch(example)
    args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
    expected = module(*args, **kwargs)
    for found in (ran(captured, *args, **kwargs), ran(captured, dict(captured.feeds[0]))):
        torch.testing.assert_close(found["total"], expected["total"], rtol=1e-4, atol=1e-4)
        assert found["more"] == expected["more"] and found["nothing"] is None and set(found) == set(expected)


class Flagged(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, twice: bool = False, times: int = 1) -> Tensor:
        y = x if mask is None else x * mask
        for _ in range(times):
            y = y + 1
        return y * 2 if twice else y


def test_what_is_no_tensor_is_fixed_and_said_so(dialect: str) -> None:
    captured = capture(Flagged(), dialect, example_inputs={"x": X, "mask": None, "twice": True, "times": 3})
    assert captured.signature.inputs == ("x",)
    assert "fixed in the captured graph, as they are no tensors: mask=None, twice=True, times=3" in captured.notes
    expected = Flagged()(X, None, True, 3)
    for found in (ran(captured, X), ran(captured, X, None, True, 3), ran(captured, x=X, times=3)):
        torch.testing.assert_close(found, expected)
    for other in ({"times": 2}, {"mask": torch.ones(3, 4)}, {"twice": 1}):
        with pytest.raises(CaptureError, match=r"in the example inputs, which fixed it, and is .* now"):
            ran(captured, x=X, **other)


def test_examples_must_fix_the_same() -> None:
    examples = [{"x": X, "times": 1}, {"x": X, "times": 2}]
    with pytest.raises(CaptureError, match=r"these differ: x, times=1; x, times=2"):
        capture(Flagged(), "onnx", example_inputs=examples)


class Added(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x - 2 * y


def test_one_tensor_that_is_given_twice_is_two_inputs(dialect: str) -> None:
    captured = capture(Added(), dialect, example_inputs=(X, X))
    torch.testing.assert_close(ran(captured, X, X + 1), Added()(X, X + 1))


class Pair(NamedTuple):
    first: Tensor
    rest: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: Tensor
    rows: int
    label: str = "none"


class Structured(nn.Module):
    """A named tuple, a frozen dataclass, a size that follows the input, and constants."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Pair:
        y = self.up(x)
        return Pair(y, {"inner": Frozen(y.sum(-1), x.shape[0], "a text"), "count": 3, "flag": True, "none": None})


def test_results_keep_dataclasses_constants_and_sizes(dialect: str, tmp_path: Path) -> None:
    module = seeded(Structured)
    target = "onnxruntime" if dialect == "onnx" else "fbgemm"
    small = graphopt.optimize(module, example_inputs=X, target=target)
    for x in (X, torch.randn(5, 4)):
        expected, found = module(x), small(x)
        assert isinstance(found, Pair) and isinstance(found.rest["inner"], Frozen)
        torch.testing.assert_close(found.first, expected.first, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.rest["inner"].logits, expected.rest["inner"].logits, rtol=1e-5, atol=1e-5)
        assert found.rest["inner"].rows == len(x) and found.rest["inner"].label == "a text"
        assert (found.rest["count"], found.rest["flag"], found.rest["none"]) == (3, True, None)
    if dialect == "onnx":
        path = small.export(tmp_path / "m.onnx")
        session = ort.InferenceSession(str(path))
        assert len(session.get_outputs()) == 3
        first = session.run(None, {"x": X.numpy()})[0]
        np.testing.assert_allclose(first, module(X).first.detach().numpy(), rtol=1e-5, atol=1e-5)


# --- dtypes of a call ----------------------------------------------------------------------------------------------


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        y: Tensor = self.table(ids) * scale
        return y


@pytest.mark.parametrize("target", ["onnxruntime", "fbgemm"])
def test_integers_are_widened_and_floats_rounded_with_one_warning(target: str) -> None:
    ids, scale = torch.ones(2, 3, dtype=torch.int64), torch.rand(4)
    small = graphopt.optimize(seeded(Table), example_inputs=(ids, scale), target=target)
    expected = small(ids, scale)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(small(ids.to(dtype), scale), expected)
    with pytest.warns(UserWarning, match="scale from float64 to float32") as caught:
        torch.testing.assert_close(small(ids.int(), scale.double()), expected)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(ids, scale.half())


def test_a_copy_of_a_result_is_its_own() -> None:
    small = graphopt.optimize(nn.Linear(4, 4), example_inputs=X)
    other = copy.deepcopy(small)
    assert torch.equal(other(X), small(X)) and other.lowered is not small.lowered
    other.report.notes.append("mine")
    assert "mine" not in small.report.notes


# --- modules that cannot be traced ---------------------------------------------------------------------------------


def test_modules_without_numbers_and_of_torchscript_are_refused() -> None:
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(CaptureError, match=r"0\.weight of Sequential is on the meta device .* load the weights"):
        capture(empty, "onnx", example_inputs=X)
    scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(CaptureError, match=r"is compiled by TorchScript.*hand over the nn.Module"):
        capture(scripted, "onnx", example_inputs=X)


# --- 16 bits -------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"y": self.down(torch.relu(self.up(x))), "rows": x.sum(-1).long()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", ["onnxruntime", "fbgemm"])
def test_a_module_in_16_bits_is_quantized_behind_its_own_types(dtype: torch.dtype, target: str) -> None:
    module, x = seeded(Small).to(dtype), X.to(dtype)
    small = graphopt.optimize(module, "quantize{scheme=dynamic}", example_inputs=x, target=target)
    assert any("captured in float32" in note for note in small.report.notes)
    assert next(one for one in small.report.passes if one.name == "quantize").changed == 2
    expected, found = module(x), small(x)
    assert found["y"].dtype is dtype and found["rows"].dtype is torch.int64
    torch.testing.assert_close(found["y"], expected["y"], rtol=0, atol=0.05)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}


class Fixed16(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(x.half())
        return y


def test_a_module_that_needs_16_bits_is_captured_as_it_is(dialect: str) -> None:
    module = seeded(Fixed16).half()
    captured = capture(module, dialect, example_inputs=X)
    assert any("call .float() and make it run" in note for note in captured.notes)
    torch.testing.assert_close(ran(captured, X), module(X), rtol=1e-2, atol=1e-2)


def test_an_onnx_file_in_bfloat16_runs() -> None:
    kind = onnx.TensorProto.BFLOAT16
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [value("x", kind, ["n", 4])], [value("y", kind, ["n", 4])]
    )
    small = graphopt.optimize(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]))
    assert torch.equal(small(X.bfloat16())["y"], -X.bfloat16())
