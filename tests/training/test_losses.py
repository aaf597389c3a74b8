"""The terms of distillation against their formulas, written out in numpy over loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from graphopt.training import losses

Array = NDArray[np.float64]
SEEDS = st.integers(0, 2**16)


def drawn(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mask(seed: int, batch: int, length: int) -> Tensor:
    """Which positions are real: the first few of each row, at least one."""
    sizes = torch.randint(1, length + 1, (batch, 1), generator=torch.Generator().manual_seed(seed))
    return torch.arange(length) < sizes


def softmax(x: Array) -> Array:
    powers: Array = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    return powers


def kl(p: Array, q: Array) -> float:
    """KL(p ‖ q)."""
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def array(x: Tensor) -> Array:
    return x.double().numpy()


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, temperature=st.sampled_from([0.5, 1.0, 4.0]), masked=st.booleans())
def test_soft_targets(seed: int, temperature: float, masked: bool) -> None:
    student, teacher, real = drawn(seed, 3, 5, 7), drawn(seed + 1, 3, 5, 7), mask(seed, 3, 5)
    pairs = zip(array(student).reshape(-1, 7), array(teacher).reshape(-1, 7), real.flatten(), strict=True)
    rows = [
        temperature**2 * kl(softmax(t / temperature), softmax(s / temperature))
        for s, t, counts in pairs
        if counts or not masked
    ]
    found = losses.soft_targets(student, teacher, temperature, real if masked else None)
    assert float(found) == pytest.approx(np.mean(rows), rel=1e-4, abs=1e-6)
    assert float(losses.soft_targets(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-6)


def test_gradients_of_soft_targets_do_not_shrink_with_the_temperature() -> None:
    """Hinton et al. 2015, section 2.1: at a high temperature T² · KL matches logits, (z - v) / N², free of T."""
    student, teacher = drawn(0, 1, 5).double().requires_grad_(), drawn(1, 1, 5).double()
    student.data -= student.data.mean()
    teacher -= teacher.mean()
    losses.soft_targets(student, teacher, 1000.0).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert torch.allclose(student.grad, ((student - teacher) / 5).detach(), rtol=0.02, atol=0.02)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, masked=st.booleans())
def test_mean_square(seed: int, masked: bool) -> None:
    student, teacher, real = drawn(seed, 3, 5, 7), drawn(seed + 1, 3, 5, 7), mask(seed, 3, 5)
    kept = array(real)[..., None].repeat(7, -1).astype(bool) if masked else np.ones((3, 5, 7), bool)
    s, t = array(student)[kept], array(teacher)[kept]
    found = losses.mean_square(student, teacher, real if masked else None)
    assert float(found) == pytest.approx(((s - t) ** 2).sum() / (t**2).sum(), rel=1e-5)
    assert float(losses.mean_square(torch.zeros(3, 2), teacher[0, :3, :2])) == pytest.approx(1)
    assert bool(losses.mean_square(student, torch.zeros_like(student)).isfinite())


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS)
def test_cosine_and_similarity(seed: int) -> None:
    student, teacher = drawn(seed, 4, 6), drawn(seed + 1, 4, 6)
    s, t = array(student), array(teacher)

    def cosine(a: Array, b: Array) -> float:
        return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))

    apart = [1 - cosine(s[row], t[row]) for row in range(4)]
    assert float(losses.cosine_distance(student, teacher)) == pytest.approx(np.mean(apart), rel=1e-4)
    squares = [(cosine(s[i], s[j]) - cosine(t[i], t[j])) ** 2 for i in range(4) for j in range(4)]
    assert float(losses.similarity_distance(student, teacher)) == pytest.approx(np.mean(squares), rel=1e-4)
    assert float(losses.similarity_distance(drawn(seed, 4, 6), drawn(seed + 1, 4, 9))) >= 0  # of any two widths


def relations(x: Array, heads: int, sizes: list[int]) -> list[list[Array]]:
    """softmax(q qᵀ / √d) of each sample and head: rows of real positions over real positions (MiniLMv2, section 3)."""
    parts = x.reshape(*x.shape[:2], heads, -1)
    return [
        [
            softmax(np.array([row[i, head] @ row[j, head] for j in range(count)]) / np.sqrt(parts.shape[-1]))
            for head in range(heads)
            for i in range(count)
        ]
        for row, count in zip(parts, sizes, strict=True)
    ]


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, heads=st.sampled_from([1, 2, 4]), masked=st.booleans())
def test_relations_are_equation_4_of_minilmv2(seed: int, heads: int, masked: bool) -> None:
    student, teacher, real = 0.5 * drawn(seed, 3, 5, 8), 0.5 * drawn(seed + 1, 3, 5, 12), mask(seed, 3, 5)
    sizes = real.sum(-1).tolist() if masked else [5, 5, 5]
    ours, theirs = relations(array(student), heads, sizes), relations(array(teacher), heads, sizes)
    rows = [kl(t, s) for a, b in zip(ours, theirs, strict=True) for s, t in zip(a, b, strict=True)]
    found = losses.relation_distance(student, teacher, heads, real if masked else None)
    assert float(found) == pytest.approx(np.mean(rows), rel=1e-4, abs=1e-7)


@settings(deadline=None, max_examples=15)
@given(seed=SEEDS)
def test_padding_has_no_gradient(seed: int) -> None:
    real = mask(seed, 3, 5)
    real[:, :2] = True  # a single position has the relation 1 to itself, whatever it holds
    terms: list[Any] = [
        lambda x, y: losses.soft_targets(x, y, 2.0, real), lambda x, y: losses.mean_square(x, y, real),
        lambda x, y: losses.relation_distance(x, y, 2, real), lambda x, y: losses.pooled(x - y, real).square().sum(),
    ]  # fmt: skip
    for term in terms:
        student = drawn(seed, 3, 5, 8).requires_grad_()
        term(student, drawn(seed + 1, 3, 5, 8)).backward()
        assert student.grad is not None and bool(student.grad.isfinite().all())
        assert not student.grad[~real].any() and bool(student.grad[real].any())


def test_pooled() -> None:
    tokens, real = drawn(0, 3, 5, 8), mask(0, 3, 5)
    expected = [array(tokens)[sample, array(real[sample]).astype(bool)].mean(0) for sample in range(3)]
    assert np.allclose(array(losses.pooled(tokens, real)), np.stack(expected), atol=1e-6)
    assert torch.allclose(losses.pooled(tokens, None), tokens.mean(1), atol=1e-6)
    assert torch.equal(losses.pooled(tokens[:, 0], real), tokens[:, 0])
    images = drawn(0, 2, 3, 4, 5)
    assert torch.allclose(losses.pooled(images, None), images.mean((2, 3)), atol=1e-6)
    assert not losses.pooled(tokens, torch.zeros(3, 5, dtype=torch.bool)).any()
