"""Both halves of a split, run in torch, against the whole convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.ir.ops.convolution import conv
from graphopt.numerics.factor import decompose
from graphopt.numerics.moments import Covariance
from graphopt.numerics.split import Split


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CONVS: list[dict[str, Any]] = [
    {},
    {"stride": (2, 1), "padding": (1, 0, 2, 1), "dilation": (1, 2)},
    {"stride": (1, 3), "padding": (0, 2, 1, 0), "dilation": (2, 1)},
]


@pytest.mark.parametrize("attributes", CONVS)
@pytest.mark.parametrize("spatial", [False, True])
def test_at_full_rank_both_halves_are_the_whole(attributes: dict[str, Any], spatial: bool) -> None:
    x, weight = seeded(2, 3, 13, 12), seeded(5, 3, 3, 2, seed=1)
    split = Split(tuple(weight.shape), spatial)
    inner, outer = split.halves(*decompose(split.matrix(weight.double())).cut(min(split.rows, split.columns)))
    first, second = split.attributes(attributes)
    y = conv(conv(x.double(), inner, **first), outer, **second)
    torch.testing.assert_close(y, conv(x.double(), weight.double(), **attributes), rtol=1e-6, atol=1e-6)
    rank = inner.shape[0]
    expected = [(rank, 3, 3, 1), (5, rank, 1, 2)] if spatial else [(rank, 3, 3, 2), (5, rank, 1, 1)]
    assert [tuple(half.shape) for half in (inner, outer)] == expected
    assert inner.numel() + outer.numel() == split.numbers(rank)


@pytest.mark.parametrize("kernel", [(), (3,), (1, 1), (2, 1, 3)])
def test_linears_and_convs_of_any_rank_split_by_channel(kernel: tuple[int, ...]) -> None:
    split = Split((6, 4, *kernel))
    weight = seeded(6, 4, *kernel)
    inner, outer = split.halves(*decompose(split.matrix(weight)).cut(2))
    assert inner.shape == (2, 4, *kernel) and outer.shape == (6, 2, *(1 for _ in kernel))
    near = torch.einsum("or,rk->ok", outer.reshape(6, 2), inner.reshape(2, -1)).reshape(weight.shape)
    assert float((weight - near).norm()) == pytest.approx(
        float(torch.linalg.svdvals(weight.reshape(6, -1).double())[2:].norm()), rel=1e-5
    )


@pytest.mark.parametrize("attributes", CONVS)
def test_moments_of_a_column_are_those_that_the_first_half_multiplies(attributes: dict[str, Any]) -> None:
    """Of each place of the 1 x k2 kernel in turn: shifted copies of the image, run through a k1 x 1 conv."""
    x, kernel = seeded(2, 3, 13, 12), (3, 2)
    defaults = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1)} | attributes
    rows = (kernel, defaults["stride"], defaults["padding"], defaults["dilation"], 1)
    patches = Covariance(18, rows)
    patches.update(x)
    split = Split((5, 3, *kernel), spatial=True)
    seen = split.moments(patches.matrix()[0])
    top, left, bottom, right = defaults["padding"]
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    reach = defaults["dilation"][1]
    expected = torch.zeros(9, 9, dtype=torch.float64)
    for place in range(2):
        column = Covariance(9, ((3, 1), defaults["stride"], (0, 0, 0, 0), (defaults["dilation"][0], 1), 1))
        column.update(padded[..., place * reach : padded.shape[-1] - (1 - place) * reach])
        expected += column.matrix()[0] / 2
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-6)


def test_what_ranks_bring_is_counted() -> None:
    channel, spatial = Split((64, 32, 3, 3)), Split((64, 32, 3, 3), spatial=True)
    assert (channel.rows, channel.columns, channel.numbers()) == (64, 288, 352)
    assert (spatial.rows, spatial.columns, spatial.numbers()) == (192, 96, 288)
    assert channel.work(10) == pytest.approx(3520 / 18432) and channel.most(channel.work()) == 52  # 53 * 352 > 18432
    # a stride halves the last axis for the second half only: 96 * 2 + 192 for each rank of 18432
    assert spatial.work(1, before=32, after=16) == pytest.approx(384 / 18432)
    assert spatial.most() == 63 and spatial.most(spatial.work(before=32, after=16)) == 47
    assert Split((1, 1)).most() == Split((2, 2)).most(0.5) == 0


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3), (4, 4, 1, 3), (4, 4, 3, 1), (4, 4, 3, 3, 3)])
def test_only_two_axes_split_spatially(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not have two axes longer than 1"):
        Split(shape, spatial=True)
