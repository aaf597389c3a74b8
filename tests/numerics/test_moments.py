"""Second moments against numpy, and patches against the convolution they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from graphopt.numerics.moments import Covariance, Mean, Norm, QuantizedMoments
from graphopt.numerics.quantize import Grid


def test_batches_add_up_to_the_whole() -> None:
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(1))
    covariance, norm, mean = Covariance(7), Norm(7), Mean(7)
    for part in (x[start : start + 9] for start in range(0, 40, 9)):
        covariance.update(part)
        norm.update(part)
        mean.update(part)
    whole = x.double().numpy()
    np.testing.assert_allclose(covariance.matrix()[0], whole.T @ whole / 40, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm.norms()[0], np.sqrt((whole**2).mean(0)), rtol=1e-6)
    np.testing.assert_allclose(mean.mean()[0], whole.mean(0), rtol=1e-5, atol=1e-6)
    assert covariance.nbytes == 7 * 7 * 8 == covariance.matrix().nbytes


def test_moments_of_quantized_rows_with_the_rows() -> None:
    """ONNX's QuantizeLinear and DequantizeLinear, in numpy; padding of a convolution is 0 in integers too."""
    x = torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(1)) + 0.3
    conv = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 3)
    grid = Grid(torch.tensor(0.02), torch.tensor(100, dtype=torch.uint8), 0, 255, None)
    moments, covariance = QuantizedMoments(9, conv, grid), Covariance(9, conv)
    integers = np.clip(np.rint(x.numpy() / np.float32(0.02)) + 100, 0, 255)
    quantized = torch.from_numpy((integers - 100) * np.float32(0.02)).float()
    for start in range(0, 40, 9):
        moments.update(x[start : start + 9])
    covariance.update(quantized)
    found, cross = moments.affine()
    torch.testing.assert_close(found, covariance.affine(), rtol=1e-4, atol=1e-5)
    patches = [F.unfold(part, 3, padding=1).reshape(40, 3, 9, 36).double() for part in (x, quantized)]
    torch.testing.assert_close(
        cross[:, :-1, :-1], torch.einsum("ngip,ngjp->gij", *patches) / (40 * 36), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(cross[:, :-1, -1], patches[0].mean((0, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cross[:, -1, :-1], patches[1].mean((0, 3)), rtol=1e-5, atol=1e-6)
    assert moments.nbytes == 2 * 3 * 81 * 8 and moments.count == 40 * 36


def test_padding_is_left_out() -> None:
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    x[~mask] = torch.nan
    covariance = Covariance(3)
    covariance.update(x, mask)
    rows = x[mask].double()
    torch.testing.assert_close(covariance.matrix()[0], rows.T @ rows / 8, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [((1, 1), (0, 0, 0, 0), (1, 1)), ((2, 1), (1, 0, 2, 1), (1, 2))]
)
def test_patches_are_what_a_convolution_multiplies(
    groups: int, stride: tuple[int, int], padding: tuple[int, ...], dilation: tuple[int, int]
) -> None:
    """‖W P‖² over the patches P, from the covariance alone, is ‖conv(x, W)‖²."""
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(2, 4, 9, 8, generator=generator), torch.randn(6, 4 // groups, 3, 2, generator=generator)
    covariance = Covariance(4 // groups * 6, ((3, 2), stride, padding, dilation, groups))
    covariance.update(x)
    padded = F.pad(x, (padding[1], padding[3], padding[0], padding[2]))
    y = F.conv2d(padded, weight, None, stride, 0, dilation, groups).double()
    rows = weight.reshape(groups, 6 // groups, -1).double()
    energy = torch.einsum("goi,gij,goj->go", rows, covariance.matrix(), rows) * covariance.count
    torch.testing.assert_close(energy.flatten(), y.square().sum((0, 2, 3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("statistic", [Covariance(3), Norm(3)])
def test_what_cannot_be_taken_in_is_refused(statistic: Covariance | Norm) -> None:
    with pytest.raises(ValueError, match="no row was observed"):
        statistic.matrix() if isinstance(statistic, Covariance) else statistic.norms()
    with pytest.raises(ValueError, match="1 of 6 values NaN"):
        statistic.update(torch.tensor([[0.0, torch.nan, 1.0]]).repeat(2, 1).masked_fill(torch.eye(2, 3) > 0, 0))
    with pytest.raises(ValueError, match="has 4 features, not 3"):
        statistic.update(torch.ones(2, 4))
