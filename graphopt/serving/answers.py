"""Outputs of the model -> what /predict answers: a table of labels and scores, an embedding, or the outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.serving.golden import Arrays
from graphopt.serving.manifest import AnswerSpec


def answer(outputs: Arrays, inputs: Arrays, spec: AnswerSpec | None) -> Any:
    """The answer to one item, as plain data. outputs, inputs: batches of one."""
    if spec is None:
        return {name: array[0].tolist() for name, array in outputs.items()}
    found = outputs[spec.output][0].astype(np.float64)
    if spec.pooling == "cls":
        found = found[0]
    elif spec.pooling == "mean":
        found = _mean(found, inputs)
    if spec.normalize:
        found = found / max(float(np.linalg.norm(found)), 1e-12)
    if spec.labels and found.ndim == 1:
        return _table(found, spec.labels)
    return found.tolist()


def _mean(tokens: NDArray[Any], inputs: Arrays) -> NDArray[Any]:
    """Over the tokens that are no padding. tokens: (length, width)."""
    mask = next((array[0] for name, array in inputs.items() if "mask" in name), np.ones(len(tokens)))
    weights = mask.astype(np.float64)[:, None]
    mean: NDArray[Any] = (tokens * weights).sum(0) / max(float(weights.sum()), 1.0)
    return mean


def _table(logits: NDArray[Any], labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """Softmax of the logits, the best first."""
    shares = np.exp(logits - logits.max())
    shares = shares / shares.sum()
    order = sorted(range(len(shares)), key=lambda place: -shares[place])
    names = [labels[place] if place < len(labels) else str(place) for place in range(len(shares))]
    return [{"label": names[place], "score": float(shares[place])} for place in order]
