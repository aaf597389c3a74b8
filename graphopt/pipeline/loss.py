"""The loss that passes follow: the user's, or the cross-entropy where the user gives none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import UsageError, user_code
from graphopt.pipeline.batches import Batch
from graphopt.pipeline.context import Loss


def followed(loss: Loss | None) -> Callable[[Any, Batch], Tensor]:
    """The user's loss, which is given the batch as the user made it; None is the cross-entropy to its labels."""
    if loss is None:
        return cross_entropy
    call = user_code("loss function", loss)
    return lambda outputs, batch: call(outputs, batch.raw)


def cross_entropy(outputs: Any, batch: Batch) -> Tensor:
    """The mean cross-entropy of logits (..., classes) to the integer labels (...) of a batch; -100 is left out.

    The logits are the output of that name, else the first one. Raises UsageError where the batch holds no labels, or
    others than these.
    """
    labels = batch.labels
    if labels is None:
        raise UsageError(
            "no loss: pass loss=<function of (outputs, batch)>, or batches with labels (dicts that hold 'labels', or "
            "tuples of inputs and labels)"
        )
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        held = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
        raise UsageError(
            f"the labels are {held}, and cross-entropy takes integers: pass loss=<function of (outputs, batch)>"
        )
    named = outputs if isinstance(outputs, Mapping) else {}
    logits = named.get("logits", next(iter(pytree.tree_leaves(outputs))))
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten().long())
