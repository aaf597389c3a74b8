"""Models of transformers that cannot be exported as they are: another implementation is taken and reported."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capture.sources import capture
from graphopt.errors import CaptureError
from tests.models import seeded, tokens

X = torch.randn(3, 4)


class Switched(nn.Module):
    """Sums by a loop over values, unless one of two settings has another form, as models of transformers have them."""

    def __init__(self, needs: dict[str, str]) -> None:
        super().__init__()
        self.needs, self.up = needs, nn.Linear(4, 4)
        self.config = SimpleNamespace(_attn_implementation="sdpa", _experts_implementation="grouped_mm")

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name

    def set_experts_implementation(self, name: str) -> None:
        if name == "unknown":
            raise ValueError(name)
        self.config._experts_implementation = name

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(x)
        if any(getattr(self.config, f"_{option}") != name for option, name in self.needs.items()):
            return y if y.sum() > 0 else -y
        return y * y.sum().sign()


NEEDS: list[tuple[dict[str, str], str]] = [
    ({"attn_implementation": "eager"}, 'attn_implementation="eager"'),
    ({"experts_implementation": "batched_mm"}, 'experts_implementation="batched_mm"'),
    ({"attn_implementation": "eager", "experts_implementation": "batched_mm"},
     'attn_implementation="eager", experts_implementation="batched_mm"'),
]  # fmt: skip


class Wrapped(nn.Module):
    """Two models of transformers, one of them under two names, in a module of the user's."""

    def __init__(self, needs: dict[str, str]) -> None:
        super().__init__()
        self.first, self.layers = Switched(needs), nn.ModuleList([Switched(needs)])
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.again(self.layers[0](self.first(x)))
        return y


def test_models_inside_a_module_of_the_users_are_changed_and_put_back(dialect: str) -> None:
    module = seeded(lambda: Wrapped({"attn_implementation": "eager"}))
    inner = [one for one in module.modules() if isinstance(one, Switched)]
    inner[1].set_attn_implementation("flash_attention_2")
    captured = capture(module, dialect, example_inputs=X)
    assert [one for one in captured.notes if one.startswith('captured with attn_implementation="eager", since')]
    assert [one.config._attn_implementation for one in inner] == ["sdpa", "flash_attention_2"]


@pytest.mark.parametrize(("needs", "chosen"), NEEDS)
def test_the_implementation_that_exports_is_taken_and_put_back(
    dialect: str, needs: dict[str, str], chosen: str
) -> None:
    module = seeded(lambda: Switched(needs))
    captured = capture(module, dialect, example_inputs=X)
    (note,) = (one for one in captured.notes if "cannot be exported" in one)
    assert note.startswith(f"captured with {chosen}, since as it is") and "\n" not in note
    assert vars(module.config) == {"_attn_implementation": "sdpa", "_experts_implementation": "grouped_mm"}
    for x in (X, -X):
        (found,) = captured.graph.evaluate({"x": x}, captured.graph.outputs)
        torch.testing.assert_close(found, module(x), rtol=1e-5, atol=1e-5)


def test_where_none_exports_the_first_failure_is_said() -> None:
    module = seeded(lambda: Switched({"attn_implementation": "none"}))
    with pytest.raises(CaptureError, match=r"cannot trace Switched .*data-dependent"):
        capture(module, "onnx", example_inputs=X)
    assert getattr(module.config, "_attn_implementation") == "sdpa"  # noqa: B009  (for the type checker)


def test_wrong_examples_are_not_tried_again() -> None:
    module = seeded(lambda: Switched({"attn_implementation": "eager"}))
    with pytest.raises(CaptureError, match="fails on the example inputs"):
        capture(module, "onnx", example_inputs=torch.randn(3, 5))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Mixtral", "T5"])
def test_models_of_transformers(kind: str) -> None:
    import transformers

    small: dict[str, Any] = {"vocab_size": 48, "num_heads": 2, "num_layers": 1, "d_model": 16, "d_kv": 8, "d_ff": 32}
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(2, 3)}
    if kind == "Mixtral":
        small = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                 "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}  # fmt: skip
        inputs = {"input_ids": tokens()}
    config = getattr(transformers, f"{kind}Config")(**small)
    kinds = {"Mixtral": "MixtralForCausalLM", "T5": "T5ForConditionalGeneration"}
    module = seeded(lambda: getattr(transformers, kinds[kind])(config))
    found = graphopt.optimize(module, example_inputs=inputs)
    assert any(note.startswith("captured with") and "cannot be exported" in note for note in found.report.notes)
    other = {name: one[:1, :-1].roll(1, 1) for name, one in inputs.items()}
    torch.testing.assert_close(found(**other).logits, module(**other).logits, rtol=0, atol=1e-4)
