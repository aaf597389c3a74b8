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
    # rules of targets: ONNX Runtime
    # rules of targets: PyTorch on the CPU, CUDA
    "input_range_from_elsewhere": "the scale of the input is not computed by choose_qparams of that very input",
    "int8_result_needs_static_range": "the kernel gives integers only where the range of its input is stored",
    "input_dtype": "the input is {dtype}, and {kernel} quantizes float32",
    "input_not_uint8": "the input is {dtype}, and the kernels read uint8",
    "residual_not_float32": "what is added is {dtype}, and the result float32",
    "saturates": "the CPU sums products of uint8 and int8 in 16 bits, which saturate: weights are as large as "
    "{max_abs}, and {safe} is safe (bits=7)",
    "depthwise_saturates": "fbgemm sums products of depthwise convs in 16 bits, which saturate: weights are as large "
    "as {max_abs}, and {safe} is safe (bits=7)",
    "weight_not_stored_per_channel": "the weight is not stored with a scale for each output channel",
    "linear_bias_computed": "the bias is computed, and the kernel packs it beforehand",
    "conv_not_constant": "a scale, the weight or the bias is computed, or the input is not uint8",
    "add_shapes_differ": "the two sides differ in shape: {a} and {b}",
    "weight_not_8_bit": "the weight is not stored in 8 bits",
    "weight_has_zero_point": "the weight is {dtype} with zero points, or another type than int8 and float8",
    "weight_not_per_channel": "the weight has other scales than one for each output",
    "float8_weight_only": "activations are not float8, and weights alone in float8 have no kernel",
    "activation_not_symmetric": "activations are {dtype}, and the kernels read {kernel} with zero point 0 on both "
    "sides",
    "activation_scale_shape": "activations have other scales than one, or one for each row",
    "too_much_padding": "kernels of 8 bits take multiples of {multiple}, and to fill up {outputs} x {inputs} would "
    "make it {growth:.2g} times as large",
    "weight_not_16_or_8_bit": "the weight is not stored in 16 or 8 bits",
    "not_a_multiple_for_2_4": "kernels for 2:4 take multiples of {outputs} x {inputs}, not {shape}",
    "not_2_4": "more than two of four neighbours in the weight are not zero",
    "triton_is_for_int8": "the Triton kernel is for int8",
    "triton_missing": "triton is not installed",
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
