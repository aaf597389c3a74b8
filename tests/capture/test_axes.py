"""Which axes are dynamic, in the user's words and in torch's forms: names that are the same stand for one size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.capture.sources import Captured, capture
from graphopt.errors import CaptureError


class Apart(nn.Module):
    """Nothing in it says that its inputs have one size."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, y * 2


class Nested(nn.Module):
    def forward(self, x: Tensor, past: list[tuple[Tensor, Tensor]], **more: Tensor) -> Tensor:
        total = x
        for key, value in past:
            total = total + (key * value).sum(1)
        return total + more["shift"] if more else total


X, Y = torch.randn(3, 4), torch.randn(3, 5)
PAST = [(torch.randn(3, 2, 4), torch.randn(3, 2, 4)), (torch.randn(3, 2, 4), torch.randn(3, 2, 4))]


def shapes(captured: Captured) -> dict[str, Any]:
    return {value.name: value.shape for value in captured.graph.inputs}


def test_axes_of_one_given_name_are_one_symbol(dialect: str) -> None:
    both = {"x": {0: "batch"}, "y": {0: "batch"}}
    captured = capture(Apart(), dialect, example_inputs=(X, Y), dynamic_shapes=both)
    assert shapes(captured) == {"x": ("batch", 4), "y": ("batch", 5)}
    assert [value.shape for value in captured.graph.outputs] == [("batch", 4), ("batch", 5)]
    one = capture(Apart(), dialect, example_inputs=(X, Y), dynamic_shapes={"x": {0: "batch"}})
    assert shapes(one) == {"x": ("batch", 4), "y": ("y_batch", 5)}


def test_given_names_are_in_the_file(tmp_path: Any) -> None:
    small = graphopt.optimize(Apart(), example_inputs=(X, Y), dynamic_shapes={"x": {0: "rows"}, "y": {0: "rows"}})
    proto = onnx.load(small.export(tmp_path / "m.onnx"))
    ends = [*proto.graph.input, *proto.graph.output]
    assert [one.type.tensor_type.shape.dim[0].dim_param for one in ends] == ["rows"] * 4


def test_axes_of_one_name_and_two_sizes_are_an_error() -> None:
    example = (X, torch.randn(2, 5))
    message = r"axis 0 of x is 3, and axis 0 of y is 2, and both are called 'batch': .* name them apart"
    with pytest.raises(CaptureError, match=message):
        capture(Apart(), "onnx", example_inputs=example, dynamic_shapes={"x": {0: "batch"}, "y": {0: "batch"}})
    apart = capture(Apart(), "onnx", example_inputs=example, dynamic_shapes={"x": {0: "batch"}})
    assert shapes(apart)["y"] == ("y_batch", 5)


batch = Dim("batch")
FORMS: dict[str, tuple[Callable[[], nn.Module], Any, Any, dict[str, Any]]] = {
    "a tuple of Dims": (Apart, (X, Y), ({0: batch}, {0: batch}), {"x": ("batch", 4), "y": ("batch", 5)}),
    "a dict of Dims": (Apart, (X, Y), {"x": {0: batch}, "y": None}, {"x": ("batch", 4), "y": (3, 5)}),
    "an entry for each axis": (Apart, (X, Y), {"x": (batch, None), "y": [Dim.DYNAMIC, Dim.STATIC]},
                               {"x": ("batch", 4), "y": ("y_batch", 5)}),
    "hints": (Apart, (X, Y), ({0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.STATIC}), {"x": ("batch", "seq"), "y": (3, 5)}),
    "a negative axis": (Apart, (X, Y), {"x": {-1: "width"}, "y": {}}, {"x": (3, "width"), "y": (3, 5)}),
    "nested": (Nested, (X, PAST), ({0: batch}, [({0: batch, 1: "past"}, {0: batch, 1: "past"})] * 2),
               {"x": ("batch", 4), "past.0.0": ("batch", "past", 4), "past.0.1": ("batch", "past", 4),
                "past.1.0": ("batch", "past", 4), "past.1.1": ("batch", "past", 4)}),
    "by path": (Nested, (X, PAST[:1]), {"x": {0: "n"}, "past.0.0": {0: "n"}, "past.0.1": {0: "n"}},
                {"x": ("n", 4), "past.0.0": ("n", 2, 4), "past.0.1": ("n", 2, 4)}),
    "under **more": (Nested, {"x": X, "past": [], "shift": X}, {"x": {0: batch}, "more": {"shift": {0: batch}}},
                     {"x": ("batch", 4), "shift": ("batch", 4)}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_dynamic_shapes_as_torch_export_takes_them(dialect: str, form: str) -> None:
    module, example, spec, expected = FORMS[form]
    assert shapes(capture(module(), dialect, example_inputs=example, dynamic_shapes=spec)) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"z": {0: "batch"}}, r"there is no input 'z'"),
        ({"x": {2: "batch"}}, "x has 2 axes, and no axis 2"),
        ({"x": ("batch",)}, "x has 2 axes, and 1 entries"),
        ({"x": {0: 3.5}}, "axis 0 of x is 3.5; give a name or a torch.export.Dim"),
        ({"x": "batch"}, "x has 'batch'; give {axis: name}"),
        (({}, {}, {}), "has 3 entries, and the example inputs are x, y"),
        ("batch", "dynamic_shapes is a str"),
    ],
)
def test_wrong_dynamic_shapes(spec: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(Apart(), "onnx", example_inputs=(X, Y), dynamic_shapes=spec)
