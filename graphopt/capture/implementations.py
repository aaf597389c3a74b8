"""Other implementations that a Hugging Face model has of attention and of experts, for one that cannot be exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import TypeVar

from torch import nn

from graphopt.capture.failures import NotExported

T = TypeVar("T")

_ATTENTION, _EXPERTS = "attn_implementation", "experts_implementation"
_OTHERS = {_ATTENTION: ("eager",), _EXPERTS: ("batched_mm",)}
"""What is tried, by the option of `from_pretrained`: forms without operators of their own or control flow by values."""


def exported_with(module: nn.Module, capture: Callable[[], T], note: Callable[[T, str], None]) -> T:
    """What `capture` returns; where it cannot export the module as it is, with another of its implementations.

    The models of transformers may stand inside a module of the user's. note: gets the result and a sentence where that
    is so. The module is left as it was. Raises NotExported, as the
    module as it is does, where no implementation can be exported.
    """
    try:
        return capture()
    except NotExported as error:
        models = _models(module)
        for settings in _settings(models):
            try:
                with _changed(models, settings):
                    found = capture()
            except Exception:  # transformers too raises where a model lacks an implementation
                continue
            chosen = ", ".join(f'{option}="{name}"' for option, name in settings.items())
            note(found, f"captured with {chosen}, since as it is the model cannot be exported ({error})")
            return found
        raise


def _models(module: nn.Module) -> list[nn.Module]:
    """The outermost models of transformers: the module itself, or those inside it."""
    if _current(module):
        return [module]
    found = {id(model): model for child in module.children() for model in _models(child)}
    return list(found.values())


def _settings(models: Sequence[nn.Module]) -> Iterator[dict[str, str]]:
    """What to try, least changes first."""
    now = [_current(model) for model in models]
    changes: dict[str, list[str | None]] = {
        option: [None, *(name for name in others if any(one.get(option, name) != name for one in now))]
        for option, others in _OTHERS.items()
    }
    tried = [dict(zip(changes, chosen, strict=True)) for chosen in product(*changes.values())]
    settings = [{option: name for option, name in one.items() if name is not None} for one in tried]
    yield from sorted(filter(None, settings), key=len)


def _current(module: nn.Module) -> dict[str, str]:
    """The implementations that a model of transformers has now, by option."""
    config = getattr(module, "config", None)
    found = {option: getattr(config, f"_{option}", None) for option in _OTHERS if hasattr(module, f"set_{option}")}
    return {option: name for option, name in found.items() if isinstance(name, str)}


@contextmanager
def _changed(models: Sequence[nn.Module], settings: dict[str, str]) -> Iterator[None]:
    before = [(model, _current(model)) for model in models]
    try:
        for model, now in before:
            for option in settings.keys() & now.keys():
                getattr(model, f"set_{option}")(settings[option])
        yield
    finally:
        for model, now in before:
            for option in settings.keys() & now.keys():
                getattr(model, f"set_{option}")(now[option])
