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
    "no_weight": "{op} has no weight",
    "not_linear_or_conv": "{op} is neither linear nor conv",
    "already_quantized": "already quantized",
    "weight_computed": "weight is computed by the graph",
    "weight_not_float": "weight is {dtype}, not float",
    "weight_tied": "weight is tied with {reader}",
    # prune
    "locked": "it {why}",
    "no_group": "in no group of {kinds}",
    "no_units_go": "all of its {size} {kind} stay",
    "not_weighed": "importance={importance} cannot weigh it: {why}",
    # sparsify
    "no_amount": "no term of amount matches it",
    "amounts_differ": "its readers ask for amounts of {amounts}",
    "not_divided": "{size} along the {axis} axis is no multiple of {multiple}",
    "nothing_to_zero": "{count} of {total} weights are to go",
    "zero_already": "{count} of {total} weights are to go, and they are zero",
    # low-rank
    "half_of_pair": "half of a pair already",
    "grouped_conv": "a conv of {groups} groups: each kernel reads {channels} of its channels",
    "kernel_of_one_axis": "a kernel {kernel} has no two axes to split; conv=channel splits it",
    "pair_not_smaller": "rank {rank} holds {pair} numbers, no fewer than the {whole} of {shape}",
    "pair_not_cheaper": "rank {rank} takes {factor:.2f} times the multiply-adds of {shape}",
    "worth_its_cost": "whole, it is worth its {budget}: rank {rank} of {shape} has an error of {error:.2g}",
    "no_rank_faster": "no rank of {shape} (x{count}) is faster: {speedups}",
    # quantize, smooth
    # cast, approximate, simplify
    "beyond_dtype": "its {value} reaches {max_abs:.3g}, and {dtype} ends at {largest:.3g}",
    "float_mask": "its mask is float, and what stands for minus infinity may be beyond float16",
    "no_approximation": "there is no approximation of {op}",
    "already_approximate": "it is approximated by {form} already",
    "norm_not_on_outputs": "the norm's axis 1 is not the linear's outputs",
    "weight_read_twice": "another node reads the weight too",
    "pair_computed": "a weight of the pair is computed by the graph",
    # merge-linear, fold-int8
    # rules of dialects
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
