"""The loss that passes follow, where the user gives none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import UsageError


def cross_entropy(outputs: Any, batch: Any) -> Tensor:
    """The mean cross-entropy of logits (..., classes) to the integer labels (...) in a batch; -100 is left out.

    The logits are the output of that name, else the first one. Raises UsageError where the batch holds no labels.
    """
    labels = next((batch[name] for name in ("labels", "label") if isinstance(batch, Mapping) and name in batch), None)
    if labels is None:
        raise UsageError("no loss: pass loss=<function of (outputs, batch)>, or batches (dicts) that hold 'labels'")
    named = outputs if isinstance(outputs, Mapping) else {}
    logits = named.get("logits", next(iter(pytree.tree_leaves(outputs))))
    return F.cross_entropy(logits.flatten(0, -2).float(), torch.as_tensor(labels).flatten())
