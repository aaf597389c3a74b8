"""What in a batch, or among the arguments of a module, is no input but a label."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

LABELS = ("labels", "label", "targets", "target")
"""What the labels of a batch are called; where several are there, the first of these is meant."""

SPANS = ("start_positions", "end_positions")
"""What the labels of question answering are called."""


def is_label(name: str) -> bool:
    """Whether an entry of a batch that is no input is a label, as `transformers.utils.find_labels` tells it."""
    return "label" in name or name in LABELS or name in SPANS


def optional_labels(module: nn.Module, names: Mapping[str, Any]) -> list[str]:
    """Which of these are labels that `forward` does without; with them it would compute a loss."""
    parameters = inspect.signature(module.forward).parameters
    needed = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    return [name for name in names if name in (*LABELS, *SPANS) and name not in needed]


def without_labels(module: nn.Module, example: Any) -> Any:
    """An example of a module's inputs; where labels are left out of it, a warning says so."""
    if not isinstance(example, Mapping) or not (labels := optional_labels(module, example)):
        return example
    warnings.warn(
        f"example_inputs: {', '.join(labels)} would make {type(module).__name__} compute a loss, and is left out of "
        "its inputs; labels belong into the batches of calibration or training",
        stacklevel=2,
    )
    return {name: value for name, value in example.items() if name not in labels}
