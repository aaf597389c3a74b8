"""Every pass takes a string or a list of them where it wants a selector."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import pytest

from graphopt.errors import UsageError
from graphopt.passes import REGISTRY
from graphopt.pipeline.selectors import Selector

ENOUGH: dict[str, dict[str, Any]] = {"prune": {"neurons": 0.5}, "cast": {"dtype": "float16"}}
"""What a pass needs besides."""
OPTIONS = [
    (name, option.name) for name, cls in REGISTRY.items() for option in fields(cls)
    if option.default is not MISSING and isinstance(option.default, Selector)
]  # fmt: skip


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_strings_become_a_selector(name: str, option: str) -> None:
    def made(value: Any) -> Any:
        return REGISTRY[name](**ENOUGH.get(name, {}), **{option: value})

    assert getattr(made("0"), option) == Selector("0")
    assert made(["encoder", "0"]) == made(("encoder", "0")) == made(Selector("encoder", "0"))
    for wrong in (3, None, [1], {"linear": 1}):
        with pytest.raises(UsageError, match=f"{name}: {option} is .*; give ops, module paths or patterns"):
            made(wrong)
