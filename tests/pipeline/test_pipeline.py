"""The text form both ways, the order of stages, selectors, and what happens when a pass fails."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import GraphError, PassError, UsageError, nearest
from graphopt.ir.graph import Graph
from graphopt.numerics.observe import MinMax
from graphopt.pipeline.context import Context
from graphopt.pipeline.instruments import Instrument, Reproduce
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.runner import Pipeline, Repeat, run_pass
from graphopt.pipeline.selectors import PerSite, Selector
from graphopt.pipeline.text import parse
from tests.language import build


@dataclass(frozen=True)
class Tidy(Pass):
    """Erase every identity."""

    name = "tidy"
    stage = Stage.SIMPLIFY
    lossless = True

    def run(self, graph: Graph, context: Context) -> None:
        for node in graph.sites("identity"):
            graph.replace(node, node.input)


@dataclass(frozen=True)
class Shrink(Pass):
    """Declines every site."""

    name = "shrink"
    stage = Stage.PRUNE

    amount: float = 0.5
    """Share that goes."""

    label: str | None = None
    """A name, or none."""

    exact: bool = False
    """Whether to be exact."""

    sizes: tuple[int, ...] = ()
    """Some sizes."""

    shares: Mapping[str, float | str | None] | None = None
    """A number for some sites."""

    targets: Selector = Selector("linear")
    """Sites."""

    ignore: Selector = Selector()
    """Sites to leave."""

    def run(self, graph: Graph, context: Context) -> None:
        for site in context.sites(graph, self.targets, self.ignore):
            context.decline(site, "too small")


@dataclass(frozen=True)
class Round(Pass):
    """Fails where it is told to."""

    name = "round"
    stage = Stage.QUANTIZE
    bits: int
    """Required."""

    def run(self, graph: Graph, context: Context) -> None:
        graph.replace(graph.nodes[-1], graph.nodes[-1].input)
        error = GraphError("no kernel")
        error.node = "encoder.fc1"  # type: ignore[attr-defined]
        raise error


@dataclass(frozen=True)
class Lower(Pass):
    """Does nothing."""

    name = "lower"
    stage = Stage.LOWER
    dialects = ("fx",)

    def run(self, graph: Graph, context: Context) -> None:
        raise AssertionError("runs on a dialect that it does not declare")


REGISTRY: dict[str, type[Pass]] = {cls.name: cls for cls in (Tidy, Shrink, Round, Lower)}
TEXT = "h = linear(x[batch,8], W[8,8])\ni = identity(h)\ny = linear(i, V[4,8])"


# --- text ----------------------------------------------------------------------------------------------------------

ops = st.text(string.printable, max_size=12)
selectors = st.lists(ops, max_size=3).map(Selector)
shrinks = st.builds(
    Shrink,
    amount=st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
    label=st.none() | ops | st.sampled_from(["none", "true", "1e5", "0", "inf", "a,b", '"', "\\"]),
    exact=st.booleans(),
    sizes=st.lists(st.integers(), max_size=3).map(tuple),
    shares=st.none() | st.dictionaries(ops, st.floats(0, 1) | ops | st.none(), max_size=3).map(PerSite),
    targets=selectors | st.sampled_from([Selector("0"), Selector("1.0", "re:a{2}[bc]"), Selector("none")]),
    ignore=selectors,
)
passes: st.SearchStrategy[Any] = st.recursive(
    shrinks | st.just(Tidy()),
    lambda inner: st.builds(Pipeline, st.lists(inner, max_size=3))
    | st.builds(Repeat, st.lists(inner, max_size=3), times=st.integers(1, 5)),
    max_leaves=5,
)


@given(st.lists(passes, max_size=4).map(Pipeline))
def test_text_round_trip(pipeline: Pipeline) -> None:
    assert parse(str(pipeline), REGISTRY) == pipeline


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Pipeline()),
        (" tidy , shrink ", Pipeline([Tidy(), Shrink()])),
        ("shrink{amount=0.25 exact=true}", Pipeline([Shrink(amount=0.25, exact=True)])),
        ("shrink{amount=0.25,exact=true,}", Pipeline([Shrink(amount=0.25, exact=True)])),
        ("shrink{targets=0.1}", Pipeline([Shrink(targets=Selector("0.1"))])),
        ("shrink{targets=[0, encoder.*]}", Pipeline([Shrink(targets=Selector("0", "encoder.*"))])),
        ('shrink{targets="re:(q|k)$"}', Pipeline([Shrink(targets=Selector("re:(q|k)$"))])),
        (
            'shrink{shares={encoder.0=0.5, conv=1 "re:[qk]$"=none} exact=true}',
            Pipeline([Shrink(shares=PerSite({"encoder.0": 0.5, "conv": 1, "re:[qk]$": None}), exact=True)]),
        ),
        ("shrink{shares={}}", Pipeline([Shrink(shares=PerSite({}))])),
        ("repeat{times=2}(tidy,(shrink))", Pipeline([Repeat([Tidy(), Pipeline([Shrink()])], times=2)])),
        ("repeat(tidy)", Pipeline([Repeat([Tidy()], times=10)])),
    ],
)
def test_reads(text: str, expected: Pipeline) -> None:
    assert parse(text, REGISTRY) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tidy,,shrink", "at character 6: cannot read ',shrink'"),
        ("tidy end", "at character 6: cannot read 'end'"),
        ("shrink{amount}", "at character 14: cannot read '}'"),
        ("shrink{amount=0.5", "at character 18: cannot read ''"),
        ("shrink{amount=}", "at character 15: cannot read '}'"),
        ('shrink{label="a}', "at character 14: cannot read"),
        (r'shrink{label="\x"}', "at character 14: cannot read"),
        ("(tidy", "at character 6: cannot read ''"),
        ("shrink{amount=1 amount=2}", "at character 17: amount is given twice"),
        ("shirnk", "there is no pass 'shirnk'; did you mean 'shrink'?"),
        ("repaet(tidy)", "did you mean 'repeat'?"),
        ("shrink{amuont=0.5}", "shrink has no option 'amuont'; did you mean 'amount'?"),
        ("round", "round needs bits"),
        ("repeat{times=0}(tidy)", "repeat: times is 0; give a whole number of at least 1"),
        ("repeat{times=true}(tidy)", "times is True"),
        ("shrink{targets=[[a]]}", "targets is (('a',),); give ops, module paths or patterns"),
        ("shrink{targets={a=1}}", "targets is {'a': '1'}; give ops, module paths or patterns"),
        ("shrink{shares={a}}", "at character 17: cannot read '}}'"),
        ("shrink{shares={a=1", "at character 19: cannot read ''"),
        ('shrink{shares={a=1 "a"=2}}', "at character 20: a is given twice"),
    ],
)
def test_refuses_to_read(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text, REGISTRY)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nearest_lists_few_names_and_no_long_list() -> None:
    assert nearest("zzz", ["b", "a"]) == "; there are a, b"
    assert nearest("zzz", [str(number) for number in range(21)]) == ""


# --- order ---------------------------------------------------------------------------------------------------------


def test_a_wrong_order_says_the_right_one() -> None:
    with pytest.raises(UsageError) as caught:
        Pipeline([Round(bits=8), Tidy(), Shrink()])
    message = str(caught.value)
    assert "shrink (PRUNE) cannot stand after round (QUANTIZE)" in message
    assert message.endswith("the right order is tidy,shrink,round")


def test_simplify_stands_anywhere_before_lower() -> None:
    Pipeline([Tidy(), Shrink(), Tidy(), Shrink(), Round(bits=8), Tidy(), Lower(), Lower()])
    with pytest.raises(UsageError, match=r"tidy \(SIMPLIFY\) cannot stand after lower \(LOWER\)"):
        Pipeline([Lower(), Tidy()])


def test_order_holds_across_nesting() -> None:
    with pytest.raises(UsageError, match="cannot stand after"):
        Pipeline([Pipeline([Round(bits=8)]), Pipeline([Shrink()])])


def test_repeat_does_not_go_back_a_stage() -> None:
    with pytest.raises(UsageError, match=r"second round of shrink \(PRUNE\), round \(QUANTIZE\)"):
        Repeat([Shrink(), Round(bits=8)])
    with pytest.raises(UsageError, match="second round"):
        Repeat([Tidy(), Lower()])
    Repeat([Tidy(), Shrink()])
    Repeat([Shrink(), Round(bits=8)], times=1)


# --- running -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EraseOne(Pass):
    """Erase the first identity."""

    name = "erase-one"
    stage = Stage.SIMPLIFY
    runs: ClassVar[list[int]] = []

    def run(self, graph: Graph, context: Context) -> None:
        self.runs.append(graph.version)
        for node in graph.sites("identity")[:1]:
            graph.replace(node, node.input)


@pytest.mark.parametrize(("times", "left", "rounds"), [(1, 2, 1), (2, 1, 2), (10, 0, 4)])
def test_repeat_runs_until_nothing_changes(times: int, left: int, rounds: int) -> None:
    graph = build("onnx", "a = identity(x[2])\nb = identity(a)\nc = identity(b)\ny = relu(c)")
    EraseOne.runs.clear()
    found = Pipeline([Repeat([EraseOne()], times=times)]).apply(graph, Context())
    assert len(found.sites("identity")) == left
    assert len(EraseOne.runs) == rounds


def test_apply_works_on_a_clone_and_keeps_the_records(dialect: str) -> None:
    graph = build(dialect, TEXT)
    before, context = graph.text(), Context()
    found = Pipeline([Pipeline([Tidy()]), Shrink(amount=0.1)]).apply(graph, context)
    assert graph.text() == before
    assert len(found.nodes) == 2
    tidy, shrink = context.report.passes
    assert (tidy.text, tidy.stage, tidy.changed, tidy.nodes_before, tidy.nodes_after) == ("tidy", "SIMPLIFY", 1, 3, 2)
    assert (shrink.text, len(shrink.eligible), shrink.changed) == ("shrink{amount=0.1}", 2, 0)
    assert set(shrink.declined.values()) == {"too small"} and set(shrink.declined) == set(shrink.eligible)


def test_a_failing_pass_names_itself_and_the_node_and_leaves_the_graph(dialect: str) -> None:
    class Watch(Instrument):
        def failed(self, pass_: Pass, graph: Graph, context: Context, error: Exception) -> str | None:
            seen.append((pass_.name, error))
            return "some-folder"

    class Broken(Instrument):
        def failed(self, pass_: Pass, graph: Graph, context: Context, error: Exception) -> str | None:
            raise OSError("the disk is full")

    seen: list[tuple[str, Exception]] = []
    graph = build(dialect, TEXT)
    before = graph.text()
    with pytest.raises(PassError) as caught:
        Pipeline([Round(bits=8)]).apply(graph, Context(instruments=[Watch(), Broken()]))
    error = caught.value
    assert (error.pass_name, error.node, error.reproducer) == ("round", "encoder.fc1", "some-folder")
    assert str(error) == "pass round failed at encoder.fc1: GraphError: no kernel; to reproduce: some-folder"
    assert seen == [("round", error.__cause__)]
    assert graph.text() == before


def test_what_fails_before_a_pass_is_a_pass_error_too(tmp_path: Path) -> None:
    class Unready(Instrument):
        def before(self, pass_: Pass, graph: Graph, context: Context) -> None:
            raise OSError("the disk is full")

    with pytest.raises(PassError, match=r"pass tidy failed: OSError: the disk is full; to reproduce: ") as caught:
        run_pass(Tidy(), build("onnx", TEXT), Context(instruments=[Reproduce(tmp_path), Unready()]))
    assert caught.value.reproducer == str(tmp_path)


def test_a_pass_refuses_a_dialect_it_does_not_declare() -> None:
    with pytest.raises(UsageError, match="lower works on fx graphs, and this target's dialect is onnx"):
        run_pass(Lower(), build("onnx", TEXT), Context())


def test_usage_errors_are_not_wrapped() -> None:
    with pytest.raises(UsageError, match="'relu' selects no site"):
        run_pass(Shrink(targets=Selector("relu")), build("onnx", TEXT), Context())


def test_statistics_without_calibration_say_how_to_give_it() -> None:
    graph = build("onnx", TEXT)
    with pytest.raises(UsageError, match="calibration=<batches of inputs>"):
        list(Context().statistics(graph, [(graph.inputs[0], MinMax())]))


# --- selectors -----------------------------------------------------------------------------------------------------


class Stub:
    """What a selector looks at."""

    def __init__(self, kind: str, path: str, name: str) -> None:
        self.kind, self.path, self.name, self.label = kind, path, name, path or name


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        (("linear",), ["encoder.0.query", "encoder.0.key", "encoder.1.query"]),
        (("encoder.0",), ["encoder.0.query", "encoder.0.key"]),
        (("encoder.*.query",), ["encoder.0.query", "encoder.1.query"]),
        (("re:key$|^pool",), ["encoder.0.key", "pool_3"]),
        (("pool_3", "encoder.1.query"), ["encoder.1.query", "pool_3"]),
        (("encoder.0.que",), []),
        ((), []),
    ],
)
def test_selectors(terms: tuple[str, ...], expected: list[str]) -> None:
    nodes: list[Any] = [
        Stub("linear", "encoder.0.query", "a"),
        Stub("linear", "encoder.0.key", "b"),
        Stub("linear", "encoder.1.query", "c"),
        Stub("onnx.MaxPool", "", "pool_3"),
    ]
    selector = Selector(terms)
    assert [node.label for node in nodes if node in selector] == expected


def test_sites_of_a_shared_module_are_counted_one_by_one() -> None:
    graph = build("onnx", TEXT)
    nodes = graph.sites("linear")
    for node in graph.nodes:
        node.native.metadata_props["graphopt.path"] = "shared.fc"  # type: ignore[attr-defined]
    context = Context()
    run_pass(Shrink(), graph, context)
    assert context.record.eligible == [f"shared.fc ({node.name})" for node in nodes]
    assert context.record.changed == 0 and len(context.record.declined) == 2


# --- values by site ------------------------------------------------------------------------------------------------


def per_site(values: dict[Any, Any], *targets: str) -> list[Any]:
    graph = build("onnx", TEXT + "\nz = relu(y)")
    first, _, second, _ = graph.nodes
    first.native.metadata_props["graphopt.path"] = "encoder.0.query"  # type: ignore[attr-defined]
    second.native.metadata_props["graphopt.path"] = "encoder.1.query"  # type: ignore[attr-defined]
    found = Context().per_site(graph, "shrink: shares", PerSite(values), Selector(targets))
    return [found.get(node) for node in graph.nodes]


def test_the_first_term_that_matches_gives_a_site_its_value() -> None:
    assert per_site({"encoder.0": 1, "linear": 2}, "linear") == [1, None, 2, None]
    assert per_site({"re:1": 1}, "linear") == [None, None, 1, None]
    assert per_site({}, "linear") == [None] * 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encodr.0": 1}, "shrink: shares: 'encodr.0' selects none of the sites in linear; did you mean 'encoder.0"),
        ({"relu": 1}, "shrink: shares: 'relu' selects none of the sites in linear"),
        ({"linear": 1, "encoder.0": 2}, "'encoder.0' is never reached, as earlier terms match all of its sites"),
        ({3: 1}, "3 selects no site; give an op, a module path or a pattern"),
    ],
)
def test_a_term_that_gives_its_value_to_no_site_is_an_error(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        per_site(values, "linear")
    assert message in str(caught.value)
