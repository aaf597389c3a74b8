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
