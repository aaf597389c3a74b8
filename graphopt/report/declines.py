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
    "no_integer_form": "{op} has no form in integers of its own",
    "matmul_side_stored": "matmul has a form in integers for two activations, and one side is stored",
    "not_float32": "{name} is {dtype}, not float32",
    "table_quantized": "its table is quantized already",
    "table_computed": "its table is computed by the graph",
    "table_tied": "its table is tied with linear {site}, which stays float",
    "no_kernel": "{target} has no fast {scheme} {op}",
    "no_kernel_uncalibrated": "{target} has no fast {scheme} {op}; static needs calibration",
    "dtype_weight_only": "{dtype} is for products of two sides: give scheme=static, dynamic or auto",
    "bits_unsupported": "a {scheme} {op} has weights of {known} bits here, not {bits}",
    "block_not_dividing": "block {block} does not divide {inputs} inputs",
    "no_term_matches": "no term of {option} matches it",
    "kept_for_goal": "stays in higher precision for {goal}: changed alone, it leaves the worst output {sqnr:.1f} dB",
    "ignored": "it is to stay float",
    "no_static_kernel": "the target has no fast static form of it",
    "input_in_float": "{value}, which it reads, stays float",
    "side_in_float": "one side stays float: {value}",
    "side_stored": "one side is stored: {value}",
    "read_in_float": "its result is read in float",
    "mean_not_global": "a mean over other axes than all of space has no form in integers",
    "padding_not_zero": "it pads with another number than 0",
    "no_weight_to_scale": "{op} has no weight to take factors",
    "smoothing_no_gain": "no factors lower the error that 8 bits are expected to make",
    "input_returned": "the graph returns its input",
    "input_shared": "{op} {site} reads its input too",
    "conv_grouped": "it is a conv in groups of several channels",
    "weight_shared": "its weight is tied with {op} {site}",
    "input_cannot_absorb": "an input of the model cannot absorb factors",
    "cannot_absorb": "{op} {site} cannot absorb factors",
    "mul_cannot_absorb": "neither side of mul {site} can absorb factors",
    "read_before": "other nodes too read the input of {op} {site}",
    "norm_over_several_axes": "{op} {site} is over several axes",
    "parameters_not_own": "the weight or bias of {op} {site} is not a stored one of its own",
    # cast, approximate, simplify
    # merge-linear, fold-int8
    "input_not_uint8": "its input is not quantized to uint8 with one scale",
    "side_not_uint8": "one side is not quantized to uint8 with one scale",
    "output_not_uint8": "its result is not quantized to uint8 with one scale",
    "weight_not_int8": "its weight is not stored in int8 with a scale for each output channel",
    "weight_zero_points": "its weight has zero points, which no int8 op has: a target with a kernel for them takes it "
    "as it is",
    "conv_scale_at_run_time": "conv has no int8 form with a scale chosen at run time",
    "conv_bias_computed": "conv has no int8 form with a bias that is computed",
    "bound_within_integers": "its result goes through a {op} that cuts off more than the integers do",
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
