"""A mesh changes no step: losses and weights are those of one process that accumulates what the ranks have."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from graphopt.training.meshes import MeshSizes
from tests.training.meshes import models
from tests.training.meshes.launch import launch
from tests.training.meshes.models import Trained

pytestmark = pytest.mark.slow

TWO = [
    *((kind, how, mesh) for kind in ("bert", "llama") for how in ("cut", "sparse")
      for mesh in ("dp=2", "fsdp=2", "tp=2", "pp=2")),
    *(("resnet", how, mesh) for how in ("cut", "sparse") for mesh in ("dp=2", "fsdp=2")),
    ("bert", "hidden", "fsdp=2"), ("bert", "hidden", "tp=2"), ("bert", "hidden", "pp=2"),
]  # fmt: skip
FOUR = [("bert", "cut", "dp=2,tp=2"), ("llama", "cut", "dp=2,tp=2"), ("llama", "sparse", "dp=2,tp=2"),
        ("bert", "cut", "dp=2,fsdp=2"), ("bert", "cut", "dp=2,pp=2")]  # fmt: skip
SINGLE = [("bert", how, mesh) for how in ("qat", "dynamic") for mesh in ("dp=2", "fsdp=2", "tp=2", "pp=2")]

BATCHES = 4
"""Of a step, over all ranks."""


def _cases(asked: list[tuple[str, str, str]]) -> list[tuple[Any, ...]]:
    """With the batches that each process accumulates."""
    sizes = [MeshSizes.parse(mesh) for *_, mesh in asked]
    return [(*case, BATCHES // (one.dp * one.fsdp)) for case, one in zip(asked, sizes, strict=True)]


@cache
def _single(kind: str, how: str, dtype: torch.dtype = torch.float64, optimizer: str = "sgd") -> Trained:
    return models.trained(kind, how, None, BATCHES, dtype=dtype, optimizer=optimizer)


def _launched(count: int, asked: list[tuple[str, str, str]], **options: Any) -> dict[tuple[str, str, str], Trained]:
    answers = launch(count, models.several, _cases(asked), **options)
    for answer in answers:
        assert not isinstance(answer, str), answer
        assert answer == answers[0], "ranks have different results"
    return dict(zip(asked, answers[0], strict=True))


@pytest.fixture(scope="module")
def two() -> Iterator[dict[tuple[str, str, str], Trained]]:
    yield _launched(2, TWO)


@pytest.fixture(scope="module")
def four() -> Iterator[dict[tuple[str, str, str], Trained]]:
    yield _launched(4, FOUR)


@pytest.fixture(scope="module")
def single() -> Iterator[dict[tuple[str, str, str], Trained]]:
    yield _launched(2, SINGLE, dtype=torch.float32)


def _require_same(found: Trained, expected: Trained) -> None:
    (losses, weights), (one_losses, one_weights) = found, expected
    assert len(losses) == len(one_losses) == 20
    assert losses == pytest.approx(one_losses, rel=1e-9)
    assert weights.keys() == one_weights.keys()
    for name, one in one_weights.items():
        largest = max(map(abs, one))
        assert weights[name] == pytest.approx(one, rel=1e-9, abs=1e-9 * max(largest, 1e-3)), name


@pytest.mark.parametrize("case", TWO, ids="-".join)
def test_two_processes(case: tuple[str, str, str], two: dict[tuple[str, str, str], Trained]) -> None:
    _require_same(two[case], _single(*case[:2]))


@pytest.mark.parametrize("case", FOUR, ids="-".join)
def test_four_processes(case: tuple[str, str, str], four: dict[tuple[str, str, str], Trained]) -> None:
    _require_same(four[case], _single(*case[:2]))


@pytest.mark.parametrize("case", SINGLE, ids="-".join)
def test_quantized_in_float32(case: tuple[str, str, str], single: dict[tuple[str, str, str], Trained]) -> None:
    """Scales are learned, and dynamic ranges are those over all parts."""
    losses = single[case][0]
    assert losses == pytest.approx(_single(*case[:2], dtype=torch.float32)[0], rel=1e-3)


def test_adamw_in_float32() -> None:
    asked = [("bert", "cut", mesh) for mesh in ("dp=2", "fsdp=2", "tp=2", "pp=2")]
    found = _launched(2, asked, dtype=torch.float32, optimizer="adamw")
    expected = _single("bert", "cut", torch.float32, "adamw")[0]
    for case in asked:
        assert found[case][0] == pytest.approx(expected, rel=1e-4), case
