"""What in a batch is no input: the names that labels go by."""

from __future__ import annotations

LABELS = ("labels", "label", "targets", "target")
"""What the labels of a batch are called; where several are there, the first of these is meant."""


def is_label(name: str) -> bool:
    """Whether an argument of a model is a label by its name, as `transformers.utils.find_labels` tells it."""
    return name in LABELS or "label" in name or name in ("start_positions", "end_positions")
