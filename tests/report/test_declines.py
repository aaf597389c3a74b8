"""Every code of a decline has its sentence, and every sentence its code."""

from __future__ import annotations

import ast
import copy
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

import pytest

from graphopt.ir.decline import Decline
from graphopt.report.declines import SENTENCES, Reason

ROOT = Path(__file__).parents[2]


def sources() -> list[Path]:
    """Every source file that ships, each once."""
    files = [file for folder in ("graphopt", "passes", "backends") for file in (ROOT / folder).rglob("*.py")]
    return sorted({file.resolve() for file in files})


def declines() -> Iterator[tuple[str, str, frozenset[str] | None]]:
    """(place, code, names of the values) of each Decline("code", ...) and Declined("code", ...) in the sources.

    The names are None where the values are given by `**values`.
    """
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
                continue
            code = node.args[0]
            if node.func.id in ("Decline", "Declined") and isinstance(code, ast.Constant):
                names = [keyword.arg for keyword in node.keywords]
                known = frozenset(name for name in names if name is not None)
                yield f"{file.relative_to(ROOT)}:{node.lineno}", str(code.value), known if None not in names else None


def fields(sentence: str) -> frozenset[str]:
    return frozenset(name.split(".")[0].split("[")[0] for _, name, _, _ in Formatter().parse(sentence) if name)


def test_every_code_has_a_sentence_that_takes_its_values() -> None:
    wrong = []
    for place, code, values in declines():
        if code not in SENTENCES:
            wrong.append(f"{place}: {code} has no sentence")
        elif values is not None and values != fields(SENTENCES[code]):
            wrong.append(
                f"{place}: {code} gives {sorted(values)}, its sentence takes {sorted(fields(SENTENCES[code]))}"
            )
    assert not wrong, "\n".join(wrong)


def test_every_sentence_is_used() -> None:
    """A code may also be given to a function that makes the decline, as the relations of axes do."""
    named = {
        node.value
        for file in sources() if file.name != "declines.py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }  # fmt: skip
    assert sorted(SENTENCES.keys() - named) == []


def test_a_reason_is_the_sentence_with_its_code_and_values() -> None:
    reason = Reason.of(Decline("slower", before=2.0, after=3.5))
    assert reason == "slower when changed: 4 us in place of 2 us"
    assert (reason.code, reason.values) == ("slower", {"before": 2.0, "after": 3.5})
    assert reason.to_dict() == {"code": "slower", "values": {"before": 2.0, "after": 3.5}, "sentence": str(reason)}


def test_a_copy_of_a_reason_keeps_its_code() -> None:
    reason = Reason.of(Decline("slower", before=2.0, after=math.inf))
    for copied in (copy.deepcopy(reason), pickle.loads(pickle.dumps(reason))):
        assert (copied, copied.code, copied.values) == (reason, "slower", reason.values)


def test_a_code_of_another_package_is_shown_with_its_values() -> None:
    assert Reason.of(Decline("too_wide")) == "too wide"
    assert Reason.of(Decline("too_wide", limit=0.5, shape=[8, 8])) == "too wide (limit 0.5, shape [8, 8])"


def test_a_sentence_without_its_value_is_an_error() -> None:
    with pytest.raises(KeyError, match="after"):
        Reason.of(Decline("slower", before=2.0))
