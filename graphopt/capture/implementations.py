"""Other implementations that a Hugging Face model has of attention and of experts, for one that cannot be exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

    note: gets the result and a sentence where that is so. The module is left as it was. Raises NotExported, as the
    module as it is does, where no implementation can be exported.
    """
    try:
        return capture()
    except NotExported as error:
        for settings in _settings(module):
            try:
                with _changed(module, settings):
                    found = capture()
            except Exception:  # transformers too raises where a model lacks an implementation
                continue
            chosen = ", ".join(f'{option}="{name}"' for option, name in settings.items())
            note(found, f"captured with {chosen}, since as it is the model cannot be exported ({error})")
            return found
        raise


def _settings(module: nn.Module) -> Iterator[dict[str, str]]:
    """What to try, least changes first."""
    now = _current(module)
    options = [[(option, name) for name in (now[option], *_OTHERS[option])] for option in now]
    tried = [{option: name for option, name in chosen if name != now[option]} for chosen in product(*options)]
    seen: list[dict[str, str]] = [{}]
    for settings in sorted(tried, key=len):
        if settings not in seen:
            seen.append(settings)
            yield settings


def _current(module: nn.Module) -> dict[str, str]:
    """The implementations that a model of transformers has now, by option."""
    config = getattr(module, "config", None)
    found = {option: getattr(config, f"_{option}", None) for option in _OTHERS if hasattr(module, f"set_{option}")}
    return {option: name for option, name in found.items() if isinstance(name, str)}


@contextmanager
def _changed(module: nn.Module, settings: dict[str, str]) -> Iterator[None]:
    before = _current(module)
    try:
        for option, name in settings.items():
            getattr(module, f"set_{option}")(name)
        yield
    finally:
        for option in settings:
            getattr(module, f"set_{option}")(before[option])
