"""How values of options are written in the text form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any


def value_text(value: Any) -> str:
    """A value of an option as the text form has it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(value_text(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + " ".join(f"{value_text(term)}={value_text(item)}" for term, item in value.items()) + "}"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_.*][^\s{}()\[\],=\"]*", value) and value not in ("true", "false", "none")
        return value if plain and not _is_number(value) else json.dumps(value)
    return repr(value) if isinstance(value, int | float) else str(value)  # a selector is its own text


def _is_number(text: str) -> bool:
    with suppress(ValueError):
        float(text)
        return True
    return False
