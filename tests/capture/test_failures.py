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
