"""A prompt -> text, token by token: greedy, or drawn from the likeliest tokens (nucleus sampling)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import UsageError, first_line
from graphopt.serving.batches import is_decoder
from graphopt.serving.golden import Arrays
from graphopt.serving.manifest import Manifest, TensorSpec
from graphopt.serving.texts import Tokenizer

PAST, PRESENT = "past_key_values.", "present."
LOGITS, IDS, MASK, POSITIONS = "logits", "input_ids", "attention_mask", "position_ids"
MOST_TOKENS = 64
MOST_STOPS = 64
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer gives for the first bytes of a character whose other bytes are in the next token."""


def can_generate(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether a model has the inputs and outputs of a causal language model, with a cache or without one."""
    names = {one.name for one in inputs if not one.name.startswith(PAST)}
    gives = any(one.name == LOGITS and len(one.shape) == 3 for one in outputs)
    return gives and IDS in names and names <= {IDS, MASK, POSITIONS}


class Generation:
    """A language model that writes on."""

    def __init__(self, manifest: Manifest, run: Callable[[Arrays], Arrays], tokenizer: Tokenizer) -> None:
        self._manifest, self._run, self._tokenizer = manifest, run, tokenizer
        self._has_cache = is_decoder(manifest.inputs)
        self._ends = frozenset(() if manifest.text is None else manifest.text.eos_ids)

    def ids(self, prompt: str) -> list[int]:
        """The tokens of a prompt, at least one."""
        if not isinstance(prompt, str):
            raise UsageError(f"the prompt is {str(prompt)[:60]}, and should be a text")
        ids = self._tokenizer.ids(prompt)
        if not ids:
            raise UsageError("the prompt has no tokens")
        return ids

    def pieces(
        self,
        ids: list[int],
        *,
        max_tokens: int = MOST_TOKENS,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """The text after the tokens of a prompt, in pieces; see `Predictor.generate`. Options are checked at once,
        before the first piece."""
        ends = _stops(stop)
        choose = _chooser(temperature, top_p, seed)
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens!r}; give a whole number, at least 1")
        most = self._manifest.max_length
        if most is not None:
            if len(ids) >= most:
                raise UsageError(f"the prompt has {len(ids)} tokens, and the model takes {most} with its answer")
            max_tokens = min(max_tokens, most - len(ids))
        return self._text(ids, max_tokens, choose, ends)

    def _text(
        self, ids: list[int], count: int, choose: Callable[[NDArray[Any]], int], stops: Sequence[str]
    ) -> Iterator[str]:
        """Pieces of text that are sure: no unfinished character, and nothing that may begin a stop text."""
        held = max((len(one) for one in stops), default=1) - 1
        said, done = "", list[int]()
        for token in self._tokens(ids, count, choose):
            done.append(token)
            text = self._tokenizer.text(done)
            found = min((place for place in (text.find(one) for one in stops) if place >= 0), default=None)
            if found is not None:
                if text[len(said) : found]:
                    yield text[len(said) : found]
                return
            sure = text.rstrip(_UNFINISHED)
            sure = sure[: len(sure) - held] if held else sure
            if len(sure) > len(said) and sure.startswith(said):
                yield sure[len(said) :]
                said = sure
        rest = self._tokenizer.text(done)[len(said) :]
        if rest:
            yield rest

    def _tokens(self, ids: list[int], count: int, choose: Callable[[NDArray[Any]], int]) -> Iterator[int]:
        """Tokens until one ends the text, at most so many."""
        given, total, past = ids, list(ids), self._empty()
        for _ in range(count):
            try:
                outputs = self._run(self._feeds(given, len(total), past))
            except Exception as error:  # the engine's own exceptions have no base of theirs
                raise UsageError(f"the model does not run on the prompt: {first_line(error)}") from error
            token = choose(outputs[LOGITS][0, -1])
            if token in self._ends:
                return
            yield token
            total.append(token)
            if self._has_cache:
                given = [token]
                past = {name: outputs[PRESENT + name.removeprefix(PAST)] for name in past}
            else:
                given = total

    def _feeds(self, ids: list[int], total: int, past: Arrays) -> Arrays:
        """ids: the tokens that are new to the cache. total: all tokens so far."""
        values = {IDS: ids, MASK: [1] * total, POSITIONS: list(range(total - len(ids), total))}
        own = {one.name: np.array([values[one.name]], one.dtype) for one in self._manifest.inputs if one.name in values}
        return own | past

    def _empty(self) -> Arrays:
        """A cache of no tokens: (1, heads, 0, head size)."""
        caches = [one for one in self._manifest.inputs if one.name.startswith(PAST)]
        return {
            one.name: np.zeros([1, *(size if isinstance(size, int) else 0 for size in one.shape[1:])], one.dtype)
            for one in caches
        }


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list | tuple) else (None,)
    if not all(isinstance(one, str) and one for one in texts):
        raise UsageError(f"stop is {stop!r}; give a text, or a list of them")
    if len(texts) > MOST_STOPS:
        raise UsageError(f"stop has {len(texts)} texts; give at most {MOST_STOPS}")
    return tuple(str(one) for one in texts)


def _chooser(temperature: float | None, top_p: float | None, seed: int | None) -> Callable[[NDArray[Any]], int]:
    """Logits (vocabulary,) -> a token."""
    for name, value, most in (("temperature", temperature, float("inf")), ("top_p", top_p, 1.0)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 <= value <= most and (name == "temperature" or value > 0)):
            wanted = "in (0, 1]" if name == "top_p" else "of at least 0"
            raise UsageError(f"{name} is {value!r}; give a number {wanted}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise UsageError(f"seed is {seed!r}; give a whole number, at least 0")
    if temperature == 0 or (temperature is None and top_p is None):
        return lambda logits: int(logits.argmax())
    random = np.random.default_rng(seed)
    heat, share = temperature or 1.0, 1.0 if top_p is None else top_p

    def draw(logits: NDArray[Any]) -> int:
        """One of the fewest tokens whose shares add up to top_p (Holtzman et al., 2020)."""
        logits = logits.astype(np.float64)
        best = logits.max()
        if not np.isfinite(best):
            raise UsageError(f"the model's logits are {best}: no token can be drawn")
        with np.errstate(over="ignore"):  # a temperature next to 0, which leaves the best token alone
            shares = np.exp((logits - best) / heat)
        shares /= shares.sum()
        order = np.argsort(-shares, kind="stable")
        kept = order[: int(np.searchsorted(shares[order].cumsum(), share)) + 1]
        return int(random.choice(kept, p=shares[kept] / shares[kept].sum()))

    return draw
