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
}
"""By code; `str.format` fills in the decline's values. A code of another package has no sentence here and is shown as
it is, with its values."""


class Reason(str):
    """The sentence of a decline, with its code and its values."""

    code: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, decline: Decline) -> Self:
        """Raises KeyError where the sentence of the code names a value that the decline lacks."""
        sentence = SENTENCES.get(decline.code)
        reason = cls(_without_sentence(decline) if sentence is None else sentence.format(**decline.values))
        reason.code, reason.values = decline.code, decline.values
        return reason

    def to_dict(self) -> dict[str, Any]:
        """Plain data: code, values, sentence."""
        return {"code": self.code, "values": dict(self.values), "sentence": str(self)}


def _without_sentence(decline: Decline) -> str:
    """The code and its values: `too wide (limit 0.5)`."""
    values = ", ".join(f"{name} {value}" for name, value in decline.values.items())
    return decline.code.replace("_", " ") + (f" ({values})" if values else "")
