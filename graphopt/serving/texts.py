"""Texts -> inputs of a model, by a tokenizer of the library `tokenizers`: no torch, and no transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from graphopt.errors import BundleError, UsageError, described, outer_door
from graphopt.serving.golden import Arrays
from graphopt.serving.manifest import TensorSpec, TextSpec

GIVES = ("input_ids", "attention_mask", "token_type_ids")
"""The inputs that a tokenizer makes."""


class Tokenizer:
    """Texts, or pairs of texts, as the model's inputs."""

    def __init__(self, content: bytes, spec: TextSpec, inputs: Sequence[TensorSpec], *, where: str) -> None:
        """content: of tokenizer.json. Raises BundleError where that is no tokenizer."""
        try:
            import tokenizers
        except ImportError as error:
            raise UsageError(f"{where}: texts need tokenizers: pip install 'graphopt[serve]'") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # which is a plain Exception
            raise BundleError(f"{where}: {spec.tokenizer} is no tokenizer: {described(error)}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._cutting = self._tokenizer
        if spec.max_length is not None:  # texts are cut, and prompts are not
            self._cutting = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
            self._cutting.enable_truncation(spec.max_length)
        self.spec = spec
        self._dtypes = {one.name: np.dtype(one.dtype) for one in inputs if one.name in GIVES}

    def __call__(self, texts: Sequence[Any], *, pad: bool = True) -> list[Arrays]:
        """Inputs for each text, a batch of one; a pair of texts is a list of two. Longer ones are cut in front of
        their last special token."""
        found = []
        several = [_text(one) for one in texts]
        with _tokenized():
            encodings = self._cutting.encode_batch(several)
        for encoding in encodings:
            if not encoding.ids:
                raise UsageError("an empty text has no tokens")
            columns = dict(zip(GIVES, (encoding.ids, encoding.attention_mask, encoding.type_ids), strict=True))
            found.append({name: np.array([columns[name]], dtype) for name, dtype in self._dtypes.items()})
        return found

    def ids(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        with _tokenized():
            return list(self._tokenizer.encode(text).ids)

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as text, without special tokens."""
        return str(self._tokenizer.decode(list(ids)))

    @property
    def vocabulary(self) -> int:
        return int(self._tokenizer.get_vocab_size())


def _tokenized() -> AbstractContextManager[None]:
    """What the tokenizer does not take, such as half of a surrogate pair, is the text's fault."""
    return outer_door(UsageError, "the text cannot be tokenized")


def _text(given: Any) -> Any:
    if isinstance(given, str):
        return given
    if isinstance(given, list | tuple) and len(given) == 2 and all(isinstance(one, str) for one in given):
        return tuple(given)
    if isinstance(given, Mapping) and isinstance(given.get("text"), str):
        pair = given.get("text_pair")
        if pair is None or isinstance(pair, str):
            return given["text"] if pair is None else (given["text"], pair)
    raise UsageError(f"a text is a string, or a list of two for a pair, and not {str(given)[:60]!r}")
