"""The loss that is followed where the user gives none, and what the user's own is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graphopt.errors import UsageError
from graphopt.pipeline.batches import Batch
from graphopt.pipeline.loss import cross_entropy, followed

LOGITS = torch.tensor([[[2.0, 0.0], [0.5, 1.0]], [[0.0, 3.0], [1.0, 1.0]]])
LABELS = torch.tensor([[0, 1], [1, -100]])


@pytest.mark.parametrize("outputs", [LOGITS, (LOGITS, LABELS), {"hidden": LABELS, "logits": LOGITS}])
@pytest.mark.parametrize("labels", [LABELS, LABELS.int()])
def test_cross_entropy_to_the_labels(outputs: Any, labels: torch.Tensor) -> None:
    expected = F.cross_entropy(LOGITS.reshape(4, 2)[:3], LABELS.reshape(4)[:3])
    assert torch.allclose(cross_entropy(outputs, Batch({}, labels, None)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "no loss: pass loss="),
        (LABELS.float(), "the labels are torch.float32, and cross-entropy takes integers"),
        ({"start_positions": LABELS}, "the labels are dict"),
        (["good"], "the labels are list"),
    ],
)
def test_refuses_other_labels(labels: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cross_entropy(LOGITS, Batch({}, labels, None))


def test_the_users_loss_is_given_the_users_batch() -> None:
    raw = (LOGITS, LABELS)
    assert followed(lambda outputs, batch: torch.tensor(float(batch is raw)))(LOGITS, Batch({}, LABELS, raw)) == 1
    assert followed(None) is cross_entropy
    with pytest.raises(UsageError, match="your loss function failed: IndexError"):
        followed(lambda outputs, batch: batch[2])(LOGITS, Batch({}, LABELS, raw))
