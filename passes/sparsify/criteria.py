"""Which weights become zero, and how the others change: the criteria of `sparsify`, by name."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from graphopt.ir.graph import Graph, Value
from graphopt.numerics import obs
from graphopt.numerics.sparsity import Pattern, as_matrix, as_weight, columns, threshold_mask
from graphopt.pipeline import inputs
from graphopt.pipeline.context import Context
from graphopt.pipeline.weights import Weight


@dataclass(frozen=True)
class Request:
    """Weights that are to become sparse, and how."""

    weights: Sequence[Weight]
    shares: Mapping[Value, float]
    """Of each weight, by its value, the amount in [0, 1); all equal where `together`."""
    pattern: Pattern
    together: bool
    """Whether a weight is ranked against those of all tensors."""
    seed: int
    damping: float


@dataclass(frozen=True)
class Sparse:
    """A weight, its new tensor, and which of its elements stay (bool, True = kept)."""

    weight: Weight
    tensor: Tensor
    mask: Tensor


def magnitude(graph: Graph, context: Context, request: Request) -> Iterator[Sparse]:
    """The smallest go (Han et al. 2015, section 3)."""
    return _ranked(request, (weight.tensor for weight in request.weights))


def movement(graph: Graph, context: Context, request: Request) -> Iterator[Sparse]:
    """As many as `magnitude` would; which ones, the training behind the pass learns (Sanh et al. 2020)."""
    return magnitude(graph, context, request)


def threshold(graph: Graph, context: Context, request: Request) -> Iterator[Sparse]:
    """What is below a share of the largest goes."""
    for weight in request.weights:
        yield _masked(weight, threshold_mask(weight.tensor, request.shares[weight.value]))


def random(graph: Graph, context: Context, request: Request) -> Iterator[Sparse]:
    """At random, by the seed and the site's label, so that no site's draw depends on the others."""

    def scores() -> Iterator[Tensor]:
        for weight in request.weights:
            drawn = zlib.crc32(f"{request.seed} {weight.sites[0].label}".encode())
            yield torch.rand(weight.tensor.shape, generator=torch.Generator().manual_seed(drawn))

    return _ranked(request, scores())


def gradient(graph: Graph, context: Context, request: Request) -> Iterator[Sparse]:
    """Those that change the loss least when zeroed, to first order: |w · dL/dw|, the mean over the batches.

    Holds the gradients of all weights at once. Source: Molchanov et al. 2017, section 2.2, for single weights.
    """
    weights = request.weights
    sums = [torch.zeros_like(weight.tensor, dtype=torch.float64) for weight in weights]
    for gradients in context.gradients(graph, [weight.value for weight in weights]):
        for total, weight, found in zip(sums, weights, gradients, strict=True):
            total += (weight.tensor * found).abs()
    return _ranked(request, sums)


def wanda(graph: Graph, context: Context, request: Request) -> Iterator[Sparse]:
    """|w| · ‖x‖ of the input that it multiplies, ranked within each output (Sun et al. 2024, section 3)."""
    dead = []
    for weight, norm in inputs.norms(graph, context, request.weights):
        norm = norm[:, columns(weight.tensor.shape)]
        matrix = as_matrix(weight.tensor).double()
        score = matrix.abs() * norm.repeat_interleave(len(matrix) // len(norm), 0)
        dead.append((weight, int((norm == 0).sum()), norm.numel()))
        mask = request.pattern.masks_by_row(score, request.shares[weight.value])
        yield _masked(weight, as_weight(mask, weight.tensor.shape))
    _note_dead(context, dead)


def sparsegpt(graph: Graph, context: Context, request: Request) -> Iterator[Sparse]:
    """Those that add least to the squared error of the layer's output; the others compensate (`numerics.obs`)."""
    dead, singular = list[tuple[Weight, int, int]](), list[str]()
    for weight, covariance in inputs.covariances(graph, context, request.weights):
        shape = weight.tensor.shape
        if len(shape) > 2:
            order = columns(shape)
            covariance = covariance[:, order][:, :, order]
        matrix = as_matrix(weight.tensor)
        grouped = matrix.reshape(len(covariance), -1, matrix.shape[1])
        amount = request.shares[weight.value]
        solved = obs.sparse_gpt(grouped, covariance, pattern=request.pattern, amount=amount, damping=request.damping)
        dead.append((weight, solved.dead, covariance.shape[0] * covariance.shape[1]))
        if solved.singular:
            singular.append(f"{weight.sites[0].label} ({solved.damping:g})")
        tensor = as_weight(solved.weight.reshape(matrix.shape), shape).to(weight.tensor.dtype)
        yield Sparse(weight, tensor, as_weight(solved.mask.reshape(matrix.shape), shape))
    _note_dead(context, dead)
    if singular:
        context.note(
            "the calibration does not tell all inputs apart (a singular covariance; more batches may): what was added "
            f"to the diagonal, as a share of its mean, decides at {', '.join(singular)}"
        )


CRITERIA: Mapping[str, Callable[[Graph, Context, Request], Iterator[Sparse]]] = MappingProxyType(
    {one.__name__: one for one in (magnitude, movement, threshold, random, gradient, wanda, sparsegpt)}
)
"""Each gives the weights of a request, in any order; the graph must not change before the last."""

CALIBRATED = ("gradient", "wanda", "sparsegpt")
"""Criteria that need calibration data."""


def _ranked(request: Request, scores: Iterable[Tensor]) -> Iterator[Sparse]:
    """The lowest scores go, in each tensor or in all together."""
    matrices = (as_matrix(score) for score in scores)
    if request.together:
        masks: Iterable[Tensor] = request.pattern.masks(matrices, max(request.shares.values()))
    else:
        shares = (request.shares[weight.value] for weight in request.weights)
        masks = (request.pattern.masks([one], share)[0] for one, share in zip(matrices, shares, strict=True))
    for weight, mask in zip(request.weights, masks, strict=True):
        yield _masked(weight, as_weight(mask, weight.tensor.shape))


def _masked(weight: Weight, mask: Tensor) -> Sparse:
    return Sparse(weight, torch.where(mask, weight.tensor, 0), mask)


def _note_dead(context: Context, dead: Sequence[tuple[Weight, int, int]]) -> None:
    found = [f"{weight.sites[0].label} ({count} of {all_})" for weight, count, all_ in dead if count]
    if found:
        context.note(f"inputs that are zero in every calibration batch, whose weights go first: {', '.join(found)}")

