"""batch_norm(conv(x, W, b))  ->  conv(x, W', b')."""

import torch
from torch import Tensor


def fold_batch_norm(
    weight: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Fold a batch norm, in inference, into the weight and bias of the linear or conv before it.

    weight: float, shape (out, ...); bias, gamma, beta, mean, var: shape (out,), bias None for zeros; var >= 0; eps:
    added to the variance. With f = gamma / sqrt(var + eps), returns W * f (shape of weight) and (b - mean) * f + beta
    (shape (out,)), both computed in float64 and given in weight's dtype.
    Raises ValueError when a vector's shape is not (out,).
    Source: Jacob et al. 2018, section 3.2.
    """
    out = weight.shape[0]
    bias = torch.zeros_like(mean) if bias is None else bias
    for name, vector in {"bias": bias, "gamma": gamma, "beta": beta, "mean": mean, "var": var}.items():
        if list(vector.shape) != [out]:
            got = f"{name} has shape {list(vector.shape)}"
            raise ValueError(f"{got}, but the weight {list(weight.shape)} needs [{out}]")
    factor = gamma.double() / torch.sqrt(var.double() + eps)
    folded = weight.contiguous().double() * factor.reshape([-1] + [1] * (weight.dim() - 1))
    shifted = (bias.double() - mean.double()) * factor + beta.double()
    return folded.to(weight.dtype), shifted.to(weight.dtype)
