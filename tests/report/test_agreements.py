"""How close outputs are: over tokens without padding, in the means of texts, and by the length of texts."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.numerics import metrics
from graphopt.report.agreements import Agreement, agreement, worst
from tests.language import build
from tests.models import padding, tokens

TEXT = """
    x = embedding(T[50,16], ids[batch,seq]:int64)
    h = layer_norm(x, G[16], B[16])
    y = add(linear(gelu(linear(h, W[32,16])), V[16,32]), h)
    m = add(mask[batch,seq]:int64, mask)
    return y, m
"""


@settings(max_examples=30, deadline=None)
@given(draw=st.integers(0, 2**16), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_padding_counts_neither_over_tokens_nor_in_means(draw: int, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(draw)
    shape = len(lengths), max(lengths), 4
    reference, candidate = (torch.randn(shape, generator=generator) for _ in range(2))
    real = torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)
    found = agreement("y", reference, candidate, real)
    for one in (reference, candidate):
        one[~real] = math.nan
    assert found == agreement("y", reference, candidate, real)
    rows = [(a[: len_].double().mean(0), b[: len_].double().mean(0))
            for a, b, len_ in zip(reference, candidate, lengths, strict=True)]  # fmt: skip
    means = metrics.sqnr(*(torch.stack(side) for side in zip(*rows, strict=True)))
    assert found.pooled is not None and abs(found.pooled - means) < 1e-9
    tokens = metrics.sqnr(reference[real], candidate[real])
    assert found.sqnr == tokens


def test_what_is_no_vector_of_a_token_has_no_mean() -> None:
    x = torch.randn(2, 3)
    assert agreement("y", x, x).pooled is None and agreement("y", x, x, torch.ones(2, 3) > 0).pooled is None
    several = [Agreement("y", 9.0, 1.0, 0.1, 7.0), Agreement("y", 8.0, 1.0, 0.1), Agreement("y", 7.0, 1.0, 0.1, 6.0)]
    assert worst(several).pooled == 6.0 and worst(several[1:2]).pooled is None


def test_the_report_compares_texts_of_several_lengths(tmp_path: Path) -> None:
    build("onnx", TEXT).save(tmp_path / "model.onnx")
    batches = [{"ids": tokens(6, 7, seed=seed) % 50, "mask": padding(6, 7)} for seed in range(3)]
    small = graphopt.optimize(
        tmp_path / "model.onnx", "quantize", example_inputs=batches[0], calibration=batches, measure=False
    )
    by_length = small.report.agreement_by_length
    assert list(by_length) == ["5 to 7", "20", "86"]  # the batches, and 4 and 16 rows joined
    assert all(one.pooled is not None and one.sqnr > 15 for several in by_length.values() for one in several[:1])
    text = str(small.report)
    assert "outputs by length of the calibration texts" in text and "pooled" in text
    assert list(small.report.to_dict()["agreement_by_length"]) == list(by_length)


def test_lossless_passes_compare_no_lengths(tmp_path: Path) -> None:
    build("onnx", TEXT).save(tmp_path / "model.onnx")
    batch = {"ids": tokens() % 50, "mask": padding()}
    small = graphopt.optimize(tmp_path / "model.onnx", example_inputs=batch, calibration=[batch], measure=False)
    assert small.report.agreement_by_length == {} and "by length" not in str(small.report)
