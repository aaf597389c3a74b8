"""Where a decline becomes a sentence: one text for each code, filled with the decline's values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from graphopt.ir.decline import Decline

SENTENCES = {
    # every pass
    "told": "{sentence}",
    "slower": "slower when changed: {after:.0f} us in place of {before:.0f} us",
    # weights (pipeline/weights.py)
    # prune
    # sparsify
    # low-rank
    # quantize, smooth
    # cast, approximate, simplify
    # merge-linear, fold-int8
    # rules of dialects
    "attention_mask_unfit": "the mask has {rank} axes, or enlarges the scores; attention takes 2 to 4 that fit",
    "attention_operands_broadcast": "queries, keys and values differ in batch or heads",
    "attention_operands_not_4d": "queries, keys or values are not 4-D",
    "attention_scores_unfit": "the softmax is over axis {axis} of {rank}; attention has it over the last of 4",
    "attention_without_product": "the softmax does not read a product of queries and keys",
    "linear_rows_regrouped": "the reshapes group rows differently: {before} becomes {after}",
    "linear_shapes_unknown": "the shapes around the linear are not known",
    "norm_bias_unfit": "the bias is not a constant of shape {shape}, as the weight is",
    "norm_epsilon_or_rank_unknown": "the epsilon is not a constant number, or the rank is unknown",
    "norm_mean_without_axis": "the mean drops its axis, so it broadcasts along another one",
    "norm_not_over_last_axis": "the mean is not over the last axis alone",
    "norm_weight_unfit": "the weight is not a constant of shape [{width}], the size of the last axis",
    "not_spelled": "{op} cannot be written here: {reason}",
    "softmax_row_may_be_nan": "a row that is masked as a whole may be NaN",
    "transpose_reshapes_differ": "the reshapes do more than merge the batch axes and split them again",
    "transpose_shapes_unknown": "the shapes are not known to be 4-D",
    # rules of targets: ONNX Runtime
    # rules of targets: PyTorch on the CPU, CUDA
}
"""By code, in the words of the user's model. A code that is not here, as of a package of the user's, reads as it is."""


class Reason(str):
    """The sentence of a decline, which also holds its code and its values."""

    code: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, decline: Decline) -> Self:
        """The sentence of a decline. Raises KeyError where its values do not fill the sentence of its code."""
        found = SENTENCES.get(decline.code)
        made = cls(_plain(decline) if found is None else found.format(**decline.values))
        made.code, made.values = decline.code, decline.values
        return made

    def __getnewargs__(self) -> tuple[str]:
        return (str(self),)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: code, values, sentence."""
        return {"code": self.code, "values": dict(self.values), "sentence": str(self)}


def _plain(decline: Decline) -> str:
    """A code of somebody else's as text: `too wide (limit 0.5)`."""
    values = ", ".join(f"{name} {value}" for name, value in decline.values.items())
    return decline.code.replace("_", " ") + (f" ({values})" if values else "")
