"""Errors of tracers and exporters: one line that says where, what, and the way out of this cause and of no other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture.sources import capture
from graphopt.errors import CaptureError


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class ImportsWhenTraced(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            import not_installed_anywhere  # type: ignore[import-not-found]  # noqa: F401
        return x + 1


class Eigenvalues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = torch.linalg.eigvalsh(x @ x.mT)
        return values


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Eigenvalues()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


CONTROL_FLOW, INSTALL = "torch.cond or torch.where", "Install what forward imports"


@pytest.mark.parametrize(
    ("module", "says", "hint"),
    [
        (Branching(), "data-dependent expression", CONTROL_FLOW),
        (ImportsWhenTraced(), "ModuleNotFoundError: No module named 'not_installed_anywhere'", INSTALL),
        (Eigenvalues(), "aten._linalg_eigh.default has no form in ONNX", None),
    ],
    ids=["a branch", "an import", "an operator"],
)
def test_an_error_names_its_own_cause_in_one_line(module: nn.Module, says: str, hint: str | None) -> None:
    with pytest.raises(CaptureError) as raised:
        capture(module, "onnx", example_inputs=torch.randn(3, 3))
    message = str(raised.value)
    assert says in message and type(module).__name__ in message
    assert [known for known in (CONTROL_FLOW, INSTALL) if known in message] == ([] if hint is None else [hint])
    assert "\n" not in message and "\x1b" not in message and len(message) < 700


def test_what_the_exporter_cannot_write_is_named_with_its_module_path() -> None:
    with pytest.raises(CaptureError, match=r"has no form in ONNX: No ONNX function found for .*\(inner\)$"):
        capture(Block(), "onnx", example_inputs=torch.randn(3, 3))


class Asserting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError


def test_an_error_without_a_message_is_its_class_alone() -> None:
    with pytest.raises(CaptureError, match=r"fails on the example inputs \(x \[3, 3\]\): AssertionError at .*:\d+ \("):
        capture(Asserting(), "onnx", example_inputs=torch.randn(3, 3))


def test_the_causes_of_a_failed_export_end() -> None:
    with pytest.raises(CaptureError) as raised:
        capture(Block(), "onnx", example_inputs=torch.randn(3, 3))
    seen: list[BaseException] = []
    error: BaseException | None = raised.value
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__
    assert error is None and len(seen) > 1


class Turned(nn.Module):
    """A linear whose weight an operator without a form in ONNX makes: of its parameter alone, or of the input too."""

    def __init__(self, by_input: bool) -> None:
        super().__init__()
        self.by_input, self.linear = by_input, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        square = self.linear.weight * x[0, :1] if self.by_input else self.linear.weight
        y: Tensor = x @ torch.linalg.matrix_exp(square - square.T) + self.linear.bias
        return y


@pytest.mark.parametrize("module", [
    nn.utils.parametrizations.orthogonal(nn.Linear(6, 6)),
    nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map="cayley"), nn.ReLU()),
    Turned(by_input=False),
])  # fmt: skip
@pytest.mark.slow
def test_operators_without_a_form_that_read_parameters_alone_are_computed_once(module: nn.Module) -> None:
    x = torch.randn(3, 6)
    captured = capture(module.eval(), "onnx", example_inputs=x)
    assert [node.kind for node in captured.graph.nodes if node.kind in ("linear", "matmul")] == ["linear"]
    assert any("has no form in ONNX: what it makes of parameters was computed once" in one for one in captured.notes)
    (y,) = captured.graph.evaluate(captured.feeds[0], captured.graph.outputs)
    torch.testing.assert_close(y, module(x))


def test_operators_without_a_form_that_read_inputs_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"aten.linalg_matrix_exp.default has no form in ONNX"):
        capture(Turned(by_input=True), "onnx", example_inputs=torch.randn(3, 6))
