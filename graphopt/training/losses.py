"""The terms of the loss of distillation, on plain tensors: each a mean over real positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.pipeline.loss import wide


def soft_targets(student: Tensor, teacher: Tensor, temperature: float, real: Tensor | None = None) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)) over the last axis (Hinton et al. 2015, section 2).

    student, teacher: logits (..., classes). real: boolean (...), False at positions that are left out.
    """
    log_student = F.log_softmax(wide(student) / temperature, -1)
    log_teacher = F.log_softmax(wide(teacher) / temperature, -1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
    return temperature**2 * masked_mean(divergence, real)


def mean_square(student: Tensor, teacher: Tensor, real: Tensor | None = None) -> Tensor:
    """The squared error as a share of the teacher's mean square, over real positions (leading axes)."""
    teacher = wide(teacher)
    error = (wide(student) - teacher).square()
    return masked_mean(error, real) / masked_mean(teacher.square(), real).clamp(min=1e-12)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of each pair of rows (batch, width), the mean."""
    return (1 - F.cosine_similarity(wide(student), wide(teacher), dim=-1)).mean()


def similarity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of the two matrices of cosines between all rows of a batch (Tung & Mori 2019)."""
    matrices = (F.normalize(wide(x), dim=-1) @ F.normalize(wide(x), dim=-1).T for x in (student, teacher))
    ours, theirs = matrices
    return F.mse_loss(ours, theirs)


def relation_distance(student: Tensor, teacher: Tensor, heads: int, real: Tensor | None = None) -> Tensor:
    """The KL divergence of the self-relations softmax(x xᵀ / √size) in each of `heads` parts (MiniLMv2, Wang et al.
    2021, equation 4).

    student, teacher: queries, keys or values of one layer (batch, length, width), of any two widths that `heads`
    divides. real: boolean (batch, length).
    """
    log_student, log_teacher = (_log_relations(x, heads, real) for x in (student, teacher))
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    if real is None:
        return divergence.sum(-1).mean()
    divergence = divergence.masked_fill(~real[:, None, None, :], 0.0).sum(-1)
    return masked_mean(divergence.transpose(1, 2), real)


def _log_relations(x: Tensor, heads: int, real: Tensor | None) -> Tensor:
    x = wide(x).reshape(*x.shape[:2], heads, -1).transpose(1, 2)
    scores = x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5
    if real is not None:
        scores = scores.masked_fill(~real[:, None, None, :], torch.finfo(scores.dtype).min)
    return F.log_softmax(scores, -1)


def pooled(tokens: Tensor, real: Tensor | None) -> Tensor:
    """The mean of (batch, length, width) over real positions (batch, length), and of images (batch, channels, height,
    width) over the last two axes; rows (batch, width) are returned as they are."""
    if tokens.dim() < 3:
        return tokens
    if tokens.dim() > 3:
        return tokens.flatten(2).mean(-1)
    if real is None:
        return tokens.mean(1)
    weight = real.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)


def masked_mean(x: Tensor, real: Tensor | None) -> Tensor:
    """The mean of x over the positions where `real` (its leading axes) is True; over all without it."""
    return x.mean() if real is None else x[real].mean()
