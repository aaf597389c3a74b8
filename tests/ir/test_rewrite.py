"""The rewriting driver: one root or several, groups of siblings, forms, and what a run remembers."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from graphopt.dialects.onnx.views import PATH
from graphopt.errors import GraphError
from graphopt.ir.decline import Decline, Declined
from graphopt.ir.graph import Value
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder, Replace, Rule, rewrite
from tests.language import assert_outputs_equal, build, listing

THREE = "a = tanh(x[2,8])\nb = relu(a)\nc = tanh(x)\nd = tanh(z[2,8])\nreturn b, c, d"


def _tanh(op: Recorder, x: str) -> Pattern:
    return op.tanh(x)


def _one_tanh(op: Builder, m: Match) -> Mapping[Value, Value]:
    shared = op.tanh(m.x)
    return {one.root.result: op.graph.emit("identity", shared, at=one.root) for one in m.group}


SHARED = Rule("shared-tanh", _tanh, _one_tanh, group_by=lambda m: m.x)


def test_siblings_are_rewritten_together_and_those_alone_stay(dialect: str) -> None:
    graph = build(dialect, THREE)
    original = graph.clone()
    log = rewrite(graph, [SHARED])["shared-tanh"]
    assert (log.hits, log.declined) == (2, {})
    assert [node.kind for node in graph.nodes] == ["tanh", "identity", "relu", "identity", "tanh"]
    assert_outputs_equal(graph, original, rtol=0)


@pytest.mark.parametrize(
    "rule",
    [
        Rule("shared-tanh", _tanh, _one_tanh, group_by=lambda m: None),
        Rule("shared-tanh", _tanh, _one_tanh, group_by=lambda m: m.x, check=lambda m: m.root.result.is_output),
    ],
    ids=["no key", "one of two fits"],
)
def test_a_match_without_a_sibling_is_left(dialect: str, rule: Rule) -> None:
    graph = build(dialect, THREE)
    before = graph.text()
    assert rewrite(graph, [rule])["shared-tanh"].hits == 0 and graph.text() == before


def test_a_declined_group_says_so_for_each_of_its_roots(dialect: str) -> None:
    def decline(op: Builder, m: Match) -> None:
        raise Declined("too_wide", limit=2)

    graph = build(dialect, THREE)
    log = rewrite(graph, [Rule("shared-tanh", _tanh, decline, group_by=lambda m: m.x)])["shared-tanh"]
    labels = [node.label for node in graph.sites("tanh")]
    assert log.declined == dict.fromkeys(labels[:2], Decline("too_wide", limit=2))


def test_a_sibling_that_an_earlier_rule_took_is_left_out(dialect: str) -> None:
    graph = build(dialect, "a = tanh(x[2,8])\nb = tanh(x)\nc = tanh(x)\nreturn a, b, c")
    first, *_ = graph.sites("tanh")
    taken = Rule("taken", _tanh, lambda op, m: op.relu(m.x), check=lambda m: m.root == first)
    assert rewrite(graph, [taken, SHARED])["shared-tanh"].hits == 2
    assert [node.kind for node in graph.nodes] == ["relu", "tanh", "identity", "identity"]


def test_one_match_replaces_the_results_of_several_nodes(dialect: str) -> None:
    def scaled(op: Recorder, x: str, scale: str, zero_point: str) -> Pattern:
        return op.quantize(x, scale, zero_point)

    def fixed(op: Builder, m: Match) -> Mapping[Value, Value]:
        at = m.scale.producer
        scale, zero_point = op.graph.emit_all("choose_qparams", op.graph.emit("relu", m.x, at=at), at=at)
        return {m.scale: scale, m.zero_point: zero_point, m.root.result: op.quantize(m.x, scale, zero_point)}

    graph = build(dialect, "s, z = choose_qparams(x[2,8])\nq = quantize(x, s, z)\ny = dequantize(q, s, z)\nreturn y")
    rule = Rule("fixed", scaled, fixed, check=lambda m: m.scale.producer.input == m.x)
    assert rewrite(graph, [rule])["fixed"].hits == 1
    assert [node.kind for node in graph.nodes] == ["relu", "choose_qparams", "quantize", "dequantize"]


def test_a_node_with_a_result_that_nothing_replaces_raises(dialect: str) -> None:
    graph = build(dialect, "s, z = choose_qparams(x[2,8])\nreturn s, z")
    half = Rule("half", lambda op, x: op.choose_qparams(x), lambda op, m: {m.root.results[1]: m.root.result})
    with pytest.raises(GraphError, match=rf"rule half .* of choose_qparams \({graph.nodes[0].label}\)"):
        rewrite(graph, [half])


def test_roots_of_one_label_are_declined_each_by_itself() -> None:
    def first_only(op: Builder, m: Match) -> Value:
        if m.root.result.is_output:
            raise Declined("returned")
        return op.relu(m.x)

    graph = build("onnx", "a = tanh(x[2,8])\nb = relu(a)\nc = tanh(b)\nreturn c")
    one, other = graph.sites("tanh")
    for node in (one, other):
        node.native.metadata_props[PATH] = "shared"  # type: ignore[attr-defined]
    log = rewrite(graph, [Rule("first", _tanh, first_only)])["first"]
    assert log.declined == {f"shared ({other.name})": Decline("returned")}


def test_what_is_emitted_once_serves_all_sites_of_a_run_and_no_other_run(dialect: str) -> None:
    def read_shared(op: Builder, m: Match) -> Value:
        return op.relu(op.once(("exp", m.x), lambda: op.exp(m.x)))

    rule = Rule("once", _tanh, read_shared)
    for _ in range(2):
        graph = build(dialect, "a = tanh(x[2,8])\nb = tanh(x)\nreturn a, b")
        rewrite(graph, [rule])
        assert listing(graph)[0].startswith("%0 = exp(x") and len(graph.sites("exp")) == 1


def test_a_replacement_of_another_shape_is_declined(dialect: str) -> None:
    graph = build(dialect, "y = tanh(x[2,8])")
    log = rewrite(graph, [Rule("wrong", _tanh, lambda op, m: op.transpose(m.x, perm=(1, 0)))])["wrong"]
    assert list(log.declined.values()) == [Decline("shape_changes", before=(2, 8), after=(8, 2))]


def test_rules_that_undo_each_other_raise(dialect: str) -> None:
    there = Rule("there", _tanh, lambda op, m: op.relu(m.x))
    back = Rule("back", lambda op, x: op.relu(x), lambda op, m: op.tanh(m.x))
    with pytest.raises(GraphError, match="after 16 rounds: there, back"):
        rewrite(build(dialect, "y = tanh(x[2,8])"), [there, back])


# --- choices -------------------------------------------------------------------------------------------------------

CHOICE = Choice("tanh", _tanh, {"apart": None, "shared": _one_tanh}, group_by=lambda m: m.x)


def test_one_form_is_taken_for_a_whole_group(dialect: str) -> None:
    graph = build(dialect, THREE)
    (match,) = CHOICE.matches(graph)
    roots = graph.sites("tanh")[:2]
    assert [one.root for one in match.group] == roots
    assert list(match.nodes) == list(CHOICE.around(match)) == roots
    asked: list[Match] = []

    def form(m: Match) -> str:
        asked.append(m)
        return "shared"

    assert rewrite(graph, [CHOICE.rule(form)])["tanh"].hits == 2
    assert [m.root for m in asked] == roots[:1]


def test_the_form_of_none_leaves_the_ops_to_other_rules(dialect: str) -> None:
    graph = build(dialect, THREE)
    assert rewrite(graph, [CHOICE.rule()])["tanh"].hits == rewrite(graph, [CHOICE.only("apart")])["tanh"].hits == 0
    other = Rule("other", _tanh, lambda op, m: op.relu(m.x))
    assert rewrite(graph, [CHOICE.rule(), other])["other"].hits == 3


def _declines(code: str) -> Replace:
    def replace(op: Builder, m: Match) -> Value:
        raise Declined(code)

    return replace


def test_a_form_that_declines_gives_way_to_the_next_and_the_first_reason_is_kept(dialect: str) -> None:
    graph = build(dialect, "y = tanh(x[2,8])")
    illegal = Choice("c", _tanh, {"first": _declines("first"), "second": _declines("second")})
    log = rewrite(graph, [illegal.rule(lambda m: "second")])["c"]
    assert list(log.declined.values()) == [Decline("second")]
    legal = Choice("c", _tanh, {"first": _declines("first"), "relu": lambda op, m: op.relu(m.x)})
    log = rewrite(graph, [legal.rule()])["c"]
    assert (log.hits, log.declined) == (1, {})


def test_a_form_that_the_opset_cannot_spell_is_left_out() -> None:
    def newer(op: Builder, m: Match) -> Value:
        return op("onnx.Gelu", m.x)

    def older(op: Builder, m: Match) -> Value:
        return op.sigmoid(m.x)

    graph = build("onnx", "y = relu(x[2,3])")
    graph.model.graph.opset_imports[""] = 17  # type: ignore[attr-defined]
    choice = Choice("either", lambda op, x: op.relu(x), {"newer": newer, "older": older})
    assert rewrite(graph.clone(), [choice.only("newer")])["either"].declined == {
        "Relu": Decline("not_spelled", reason="Gelu is not in opset 17")
    }
    rewrite(graph, [choice.rule(lambda match: "newer")])
    assert graph.text() == "%0 = sigmoid(x[2,3])\nreturn %0[2,3]"


def test_an_exact_choice_offers_no_lossy_form_even_where_it_is_asked_for() -> None:
    forms = {"rounded": lambda op, m: op.sigmoid(m.x), "kept": lambda op, m: op.tanh(m.x)}
    choice = Choice("either", lambda op, x: op.relu(x), forms, lossy=frozenset({"rounded"}))
    graph = build("onnx", "y = relu(x[2,3])")
    rewrite(graph, [choice.exact().rule(lambda match: "rounded")])
    assert graph.text() == "%0 = tanh(x[2,3])\nreturn %0[2,3]"
