"""Where a decline becomes a sentence: one text for each code, filled with the decline's values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from graphopt.ir.decline import Decline

SENTENCES = {
    # every pass
    "told": "{sentence}",
    "slower": "slower when changed: {after:.0f} us in place of {before:.0f} us",
    # groups (analysis)
    "axis_of_input": "it is the model's input '{input}'",
    "axis_of_output": "it is the model's output '{output}'",
    "axis_of_one_unit": "it has a single unit",
    "axis_of_space": "it is a space axis of {op} ({node})",
    "axis_of_attention_mask": "it is a length of the mask of {op} ({node})",
    "axis_inside_attention": "it is a length or the size of a head of {op} ({node})",
    "axis_inside_a_group": "it is inside a group of {op} ({node})",
    "axis_joined_to_unknown_size": "it is joined to an axis of unknown size by {op} ({node})",
    "axis_looked_up": "it is looked up by index in {op} ({node})",
    "axis_meets_another_size": "it meets an axis of another size, or of an unknown one, at {op} ({node})",
    "axis_mixed": "it is mixed by {op} ({node})",
    "axis_normalized": "it is normalized by {op} ({node})",
    "axis_padded": "it is padded by {op} ({node})",
    "axis_picked_by_index": "it is picked by index by {op} ({node})",
    "axis_read_in_subgraph": "it is read inside {op} ({node})",
    "axis_read_whole": "it is read whole by {op} ({node})",
    "axis_repeated": "it is repeated by {op} ({node})",
    "axis_rolled": "it is rolled by {op} ({node})",
    "axis_split_or_merged": "it is split or merged by {op} ({node})",
    "axis_stacked": "it is the axis that {op} stacks along ({node})",
    "axis_summed_up": "{op} computes running sums along it ({node})",
    "axis_taken_apart": "it is taken apart by {op} ({node})",
    "axis_taken_in_part": "it is taken in part by {op} ({node})",
    "axis_taken_in_steps": "it is taken in steps by {op} ({node})",
    "axis_at_a_fixed_op": "it reaches {op} ({node}), whose axes cannot shrink",
    "axis_at_unknown_operation": "it reaches {op} ({node}), which is not known",
    "axis_in_blocks": "it reaches {op} ({node}), which has a scale a block",
    "axis_in_product_of_vector": "it reaches {op} ({node}), one of whose operands is a vector",
    "axis_in_sequence": "it reaches {op} ({node}), whose sequence is not read part by part",
    "axis_in_unknown_form": "it reaches {op} ({node}), in a form that is not known",
    "axis_of_a_view": "it reaches {op} ({node}), which reads a view of another value",
    "axis_of_groups": "it reaches {op} ({node}), a transposed conv in groups",
    "axis_of_unknown_channels": "it reaches {op} ({node}), where the number of channels is not known",
    "axis_of_unknown_heads": "it reaches {op} ({node}), where the number of heads is not known",
    "axis_of_unknown_rank": "it reaches {op} ({node}), where the rank of '{value}' is not known",
    "axis_of_unknown_size": "it reaches {op} ({node}), where the size of an axis is not known",
    "axis_padded_by_computed_amount": "it reaches {op} ({node}), which pads by an amount that the model computes",
    "axis_that_is_computed": "it reaches {op} ({node}), along an axis that the model computes",
    "axis_with_computed_bounds": "it reaches {op} ({node}), whose bounds the model computes",
    # weights (pipeline/weights.py)
    # prune
    # sparsify
    # low-rank
    # quantize, smooth
    # cast, approximate, simplify
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
