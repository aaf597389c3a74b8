"""A bundle -> answers, in a program of one's own: the engine of the server without the server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, Protocol, overload

import numpy as np

from graphopt.errors import BundleError, UsageError, described, first_line, nearest, user_code
from graphopt.serving import bundles, golden
from graphopt.serving.answers import answer
from graphopt.serving.batches import SIZES, are_rows, cropped, length_of, padded
from graphopt.serving.engine import row, stacked
from graphopt.serving.generation import Generation
from graphopt.serving.golden import Arrays
from graphopt.serving.images import Images
from graphopt.serving.requests import checked
from graphopt.serving.texts import Tokenizer

CODE = "graphopt.serving"
"""The group of entry points that a bundle may name as its own code."""


class Steps(Protocol):
    """Code of a user's: what the entry point names, or what it returns when it is called."""

    def before(self, items: Sequence[Any]) -> list[Arrays]:
        """Inputs of the model for each item, a batch of one."""

    def after(self, outputs: Arrays) -> Any:
        """The answer to one item, as plain data. outputs: a batch of one."""


class Predictor:
    """Answers from a bundle; several threads may use it at once.

    `predictor(input_ids=..., attention_mask=...)` takes arrays and returns arrays by name; `predict` takes texts or
    images, and `generate` a prompt.
    """

    def __init__(self, folder: str | Path, *, threads: int | None = None) -> None:
        """threads: of the engine; None takes what the bundle says.

        Raises BundleError where the bundle is damaged or does not run here, and where it answers its golden inputs with
        an SQNR more than 3 dB below the recorded one.
        """
        bundle = bundles.opened(folder)
        self.folder, self.manifest, self.digest = bundle.folder, bundle.manifest, bundle.digest
        self.engine = bundle.engine(threads)
        self.cases = bundle.cases
        require_same_ends(bundle, self.engine)
        self.sqnr = replayed(bundle, self.engine)
        """Of the golden inputs, on this machine."""
        own, where = self.manifest, str(folder)
        self.tokenizer: Tokenizer | None = None
        if own.text is not None:
            self.tokenizer = Tokenizer(bundle.content[own.text.tokenizer], own.text, own.inputs, where=where)
        self.images = None if own.image is None else Images(own.image, own.inputs, where=where)
        self.code: Steps | None = None if own.code is None else _code(own.code, where)
        self.generation: Generation | None = None
        if self.tokenizer is not None and own.text is not None and own.text.generates:
            self.generation = Generation(own, self.engine.run, self.tokenizer)

    def __call__(self, *args: Any, **kwargs: Any) -> Arrays:
        """Arrays (or lists of numbers) by name, or in the order of the inputs -> arrays by name.

        Raises UsageError for inputs that do not fit (`requests.checked`), and where the model does not run on them.
        """
        names = [one.name for one in self.manifest.inputs]
        if len(args) > len(names):
            raise UsageError(f"the model takes {len(names)} inputs ({', '.join(names)}), not {len(args)}")
        is_named = len(args) == 1 and isinstance(args[0], Mapping)
        given = dict(args[0]) if is_named else dict(zip(names, args, strict=False))
        return self.run(checked(given | kwargs, self.manifest))

    def run(self, feeds: Arrays) -> Arrays:
        """Outputs by name, of feeds that were checked. Raises UsageError where the model does not run on them."""
        try:
            return self.engine.run(feeds)
        except Exception as error:  # the engine's own exceptions have no base of theirs
            raise UsageError(f"the model does not run on these inputs: {first_line(error)}") from error

    def predict(self, items: Any) -> Any:
        """The answer to a text or an image, or a list of answers to a list of them; plain data, ready for JSON.

        An answer is a table of labels and scores (the best first) where the bundle has labels, an embedding where it
        has a pooling, else the outputs. A text may be a pair: {"text": ..., "text_pair": ...}.
        Raises UsageError for items that the bundle has no steps for.
        """
        several = list(items) if isinstance(items, list | tuple) else [items]
        feeds = self.prepared(several)
        found = [self.answer(outputs, inputs) for outputs, inputs in zip(self._in_batches(feeds), feeds, strict=True)]
        return found if isinstance(items, list | tuple) else found[0]

    @overload
    def generate(self, prompt: str, *, stream: Literal[False] = False, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: str, *, stream: Literal[True], **options: Any) -> Iterator[str]: ...

    def generate(self, prompt: str, *, stream: bool = False, **options: Any) -> str | Iterator[str]:
        """What a language model writes after a prompt. stream: pieces of the text, as they come.

        options: max_tokens (64), top_p in (0, 1] and temperature (> 0) to draw the next token, which is else the
        likeliest, seed, and stop: texts that end it, and are not part of the answer.
        Raises UsageError where the bundle is no language model, and for other options.
        """
        generation = self.require_generation()
        pieces = generation.pieces(generation.ids(prompt), **options)
        return pieces if stream else "".join(pieces)

    def require_generation(self) -> Generation:
        """Raises UsageError where the bundle is no language model."""
        if self.generation is None:
            raise UsageError(f"{self.manifest.name} is no language model with a tokenizer: it generates nothing")
        return self.generation

    def prepared(self, items: Sequence[Any]) -> list[Arrays]:
        """The inputs of each item, a batch of one, checked."""
        if not items:
            raise UsageError("there is no item to predict")
        if self.code is not None:
            found = user_code(f"code {self.manifest.code}", self.code.before)(items)
        elif self.images is not None:
            found = self.images(items)
        elif self.tokenizer is not None:
            found = self.tokenizer(items)
        else:
            raise UsageError(f"{self.manifest.name} has no tokenizer and no transforms of images: send its inputs")
        return [checked(one, self.manifest) for one in found]

    def answer(self, outputs: Arrays, inputs: Arrays) -> Any:
        """The answer to one item. outputs, inputs: batches of one."""
        if self.code is not None:
            return user_code(f"code {self.manifest.code}", self.code.after)(outputs)
        return answer(outputs, inputs, self.manifest.answer)

    def _in_batches(self, feeds: Sequence[Arrays]) -> Iterator[Arrays]:
        """Outputs of each, a batch of one: together where the bundle says that this changes no answer."""
        own = self.manifest
        padding = own.padding if own.padding is not None and own.padding.invariant else None
        if not own.batch_invariant or len(feeds) == 1:
            yield from map(self.run, feeds)
            return
        for start in range(0, len(feeds), SIZES[-1]):
            group = feeds[start : start + SIZES[-1]]
            lengths = [0 if padding is None else length_of(one, own.inputs, padding.axis) for one in group]
            if padding is not None:
                group = [padded(one, own.inputs, padding, max(lengths)) for one in group]
            if len({tuple(array.shape for array in one.values()) for one in group}) > 1:
                yield from map(self.run, group)
                continue
            outputs = self.run(stacked(group))
            if not are_rows(outputs, len(group)):
                yield from map(self.run, group)  # rows are no parts of these outputs
                continue
            for number, length in enumerate(lengths):
                one = row(outputs, number)
                yield one if padding is None else cropped(one, own.outputs, padding, length)


def require_same_ends(bundle: bundles.Bundle, engine: Any) -> None:
    """Raise BundleError where the model has other inputs or outputs than its manifest says."""
    own = bundle.manifest
    for what, said, found in (("inputs", own.inputs, engine.inputs), ("outputs", own.outputs, engine.outputs)):
        if [(one.name, one.dtype, len(one.shape)) for one in said] != [
            (one.name, one.dtype, len(one.shape)) for one in found
        ]:
            raise BundleError(f"{bundle.folder}: the {what} of the model are not those that its manifest names")


def replayed(bundle: bundles.Bundle, engine: Any) -> float:
    """SQNR (dB) of the answers to the golden inputs. Raises BundleError where it is too far below the recorded one."""
    own = bundle.manifest
    cases = bundle.cases
    if len(cases) != own.golden.cases:
        raise BundleError(f"{bundle.folder}: {own.golden.file} has {len(cases)} cases, not {own.golden.cases}")
    try:
        found, _ = golden.replay(engine.run, cases)
    except Exception as error:  # the engine's own exceptions have no base of theirs
        raise BundleError(f"{bundle.folder} does not run on its golden inputs: {first_line(error)}") from error
    least = golden.least(own.golden.sqnr)
    if np.isnan(found) or found < least:
        lacks = bundles.missing_flags(own)
        why = f"; it was tuned for a CPU with {lacks}, which this one lacks: make it again here" if lacks else ""
        raise BundleError(
            f"{bundle.folder} answers its golden inputs with an SQNR of {found:.1f} dB on this machine, and should "
            f"have {least:.1f}: {own.golden.sqnr:.1f} were recorded{why}"
        )
    return found


def _code(name: str, where: str) -> Steps:
    """What an installed package registers under a name."""
    found = {one.name: one for one in entry_points(group=CODE)}
    if name not in found:
        raise BundleError(
            f"{where} needs the code {name!r}, which no installed package has as an entry point of {CODE}"
            f"{nearest(name, list(found))}"
        )
    try:
        loaded = found[name].load()
        steps: Steps = loaded() if isinstance(loaded, type) else loaded
    except Exception as error:
        raise BundleError(f"{where}: the code {name!r} cannot be loaded: {described(error)}") from error
    for part in ("before", "after"):
        if not callable(getattr(steps, part, None)):
            raise BundleError(f"{where}: the code {name!r} has no function {part}")
    return steps
