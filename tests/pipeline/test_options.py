"""Options of passes: what each type takes, what it refuses and says, and that all of it survives the text form."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import UsageError
from graphopt.passes import REGISTRY, Prune
from graphopt.pipeline.options import Range, takes_sites
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.runner import Pipeline
from graphopt.pipeline.selectors import PerSite, Selector
from graphopt.pipeline.text import parse

Share = Annotated[float, Range(0, 1, open_high=True)]


@dataclass(frozen=True)
class Options(Pass):
    """One option of each type that passes use."""

    name = "options"
    stage = Stage.SIMPLIFY

    share: Share = 0.0
    count: Annotated[int, Range(low=1)] | None = None
    rank: Annotated[int, Range(1)] | Annotated[float, Range(0, 1, open_low=True)] | Literal["break-even"] | None = None
    number: float = 0.0
    text: str = ""
    switch: bool = False
    auto: bool | None = None
    mode: Literal["layer", "global"] = "layer"
    bits: Literal[2, 4, 8] = 8
    kinds: tuple[Literal["heads", "neurons"], ...] = ()
    sizes: tuple[int, ...] = ()
    amount: Share | Mapping[str, Share] | None = None
    schemes: Literal["auto"] | Mapping[str, Literal["static", "dynamic"]] = "auto"
    targets: Selector = Selector("linear")
    only: Selector | None = None


@pytest.mark.parametrize(
    ("option", "value", "stored"),
    [
        ("share", 0, 0),
        ("share", 0.999, 0.999),
        ("count", 1, 1),
        ("rank", 8, 8),
        ("rank", 1.0, 1.0),
        ("rank", "break-even", "break-even"),
        ("number", float("-inf"), float("-inf")),
        ("auto", False, False),
        ("bits", 4, 4),
        ("kinds", "heads", ("heads",)),
        ("kinds", ["heads", "neurons"], ("heads", "neurons")),
        ("sizes", 3, (3,)),
        ("amount", {"linear": 0.5}, PerSite({"linear": 0.5})),
        ("amount", {}, PerSite({})),
        ("targets", "0", Selector("0")),
        ("targets", ["encoder", "0"], Selector("encoder", "0")),
        ("only", ("encoder",), Selector("encoder")),
        ("only", None, None),
    ],
)
def test_stores(option: str, value: Any, stored: Any) -> None:
    found = getattr(Options(**{option: value}), option)
    assert found == stored and type(found) is type(stored)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("share", 1.5, "1.5; give a number of at least 0 and below 1"),
        ("share", 1, "1; give a number of at least 0 and below 1"),
        ("share", True, "True; give a number of at least 0 and below 1"),
        ("share", "half", "'half'; give a number of at least 0 and below 1"),
        ("share", float("nan"), "nan; give a number of at least 0 and below 1"),
        ("share", None, "None; give a number of at least 0 and below 1"),
        ("count", 0, "0; give a whole number of at least 1 or none"),
        ("count", 2.0, "2.0; give a whole number of at least 1 or none"),
        ("rank", 0, "0; give a whole number of at least 1, a number above 0 and at most 1, break-even or none"),
        ("rank", True, "True; give a whole number of at least 1, a number above 0 and at most 1, break-even or none"),
        ("number", float("nan"), "nan; give a number"),
        ("text", 3, "3; give a text"),
        ("switch", 1, "1; give true or false"),
        ("auto", 0, "0; give true, false or none"),
        ("mode", "local", "'local'; give layer or global; did you mean 'layer'?"),
        ("mode", ["layer"], "['layer']; give layer or global"),
        ("bits", 3, "3; give 2, 4 or 8"),
        ("bits", 4.0, "4.0; give 2, 4 or 8"),
        ("kinds", ["heads", "rows"], "'rows'; give heads or neurons"),
        ("sizes", [1, True], "True; give a whole number"),
        ("amount", {"linear": 1.5}, "1.5; give a number of at least 0 and below 1"),
        ("amount", [0.5], "[0.5]; give a number of at least 0 and below 1, a value for each site or none"),
        ("schemes", {"linear": "auto"}, "'auto'; give static or dynamic"),
        ("targets", 3, "3; give ops, module paths or patterns"),
        ("targets", [1], "[1]; give ops, module paths or patterns"),
        ("targets", {"linear": 1}, "{'linear': 1}; give ops, module paths or patterns"),
        ("only", 3, "3; give ops, module paths or patterns or none"),
    ],
)
def test_refuses(option: str, value: Any, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        Options(**{option: value})
    assert str(caught.value) == f"options: {option} is {told}"


scalars = st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=8)
words = st.sampled_from(["layer", "heads", "neurons", "auto", "static", "dynamic", "break-even", "none", "1e5"])
values = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | words, inner, max_size=3),
    max_leaves=4,
)


def accepted(option: str, value: Any) -> bool:
    with suppress(UsageError):
        return bool(Options(**{option: value}))
    return False


@given(st.fixed_dictionaries({field.name: values for field in fields(Options)}))
def test_what_is_accepted_survives_the_text_form(drawn: dict[str, Any]) -> None:
    pass_ = Options(**{option: value for option, value in drawn.items() if accepted(option, value)})
    assert parse(str(pass_), {"options": Options}) == Pipeline([pass_])


def test_options_that_exclude_each_other_are_asked_for_once_all_are_valid() -> None:
    @dataclass(frozen=True)
    class Either(Options):
        name = "either"

        def contradiction(self) -> str | None:
            return "give share or count, and not both" if self.share and self.count else None

    with pytest.raises(UsageError, match="either: give share or count, and not both"):
        Either(share=0.5, count=1)
    with pytest.raises(UsageError, match="either: count is 0"):
        Either(share=0.5, count=0)


def test_given_are_the_options_that_differ_from_their_defaults() -> None:
    assert Options(share=0.5, switch=False, targets="linear").given() == {"share": 0.5}  # type: ignore[arg-type]


ENOUGH: dict[str, dict[str, Any]] = {"prune": {"neurons": 0.5}}
"""What a pass needs besides."""
SELECTORS = [(name, f.name) for name, cls in REGISTRY.items() for f in fields(cls) if takes_sites(cls, f.name)]


@pytest.mark.parametrize(("name", "option"), SELECTORS)
def test_every_pass_takes_strings_where_it_wants_a_selector(name: str, option: str) -> None:
    def made(value: Any) -> Any:
        return REGISTRY[name](**ENOUGH.get(name, {}), **{option: value})

    assert getattr(made("0"), option) == Selector("0")
    assert made(["encoder", "0"]) == made(("encoder", "0")) == made(Selector("encoder", "0"))


def test_selectors_are_equal_in_any_order() -> None:
    """No behaviour hangs on how a selector is spelled; values by site are taken in order."""
    default, spelled = Selector("linear", "conv"), Selector("conv", "linear", "conv")
    assert default == spelled and hash(default) == hash(spelled)
    assert default != Selector("linear") and default != ("linear", "conv")
    assert Prune(neurons=0.5, targets=Selector(*reversed(Prune.targets.terms))).given() == {"neurons": 0.5}
    assert PerSite({"linear": 1, "conv": 2}) != PerSite({"conv": 2, "linear": 1})
