"""approximate: gelu by erf -> gelu by tanh."""

import torch

import graphopt
from graphopt.ir.decline import Decline
from graphopt.passes import Approximate
from graphopt.pipeline.selectors import Selector
from tests.language import assert_unchanged, build, declines, listing, run
from tests.models import Encoder, padding, seeded, tokens


def test_takes_the_tanh_form(dialect: str) -> None:
    graph = build(dialect, "y = gelu(relu(gelu(x[2,8])))")
    context = run(Approximate(), graph)
    assert listing(graph) == [
        "%0 = gelu(x[2,8], approximate=tanh)",
        "%1 = relu(%0[2,8])",
        "%2 = gelu(%1[2,8], approximate=tanh)",
        "return %2[2,8]",
    ]
    assert context.record.changed == 2
    assert_unchanged(Approximate(), graph)


def test_what_is_approximated_already_is_declined(dialect: str) -> None:
    graph = build(dialect, "y = gelu(x[2,8], approximate=tanh)")
    assert declines(run(Approximate(), graph)) == [Decline("already_approximate", form="tanh")]


def test_what_has_no_approximation_is_declined(dialect: str) -> None:
    graph = build(dialect, "y = relu(x[2,8])")
    assert declines(run(Approximate(targets=Selector("relu")), graph)) == [Decline("no_approximation", op="relu")]


def test_the_two_are_as_near_as_the_pass_says() -> None:
    x = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    exact = x * torch.special.ndtr(x)
    assert (torch.nn.functional.gelu(x, approximate="tanh") - exact).abs().max() < 4.8e-4


def test_the_report_counts_it_as_a_loss_and_only_where_it_was_asked_for() -> None:
    inputs = {"ids": tokens(), "mask": padding()}
    exact, small = (graphopt.optimize(seeded(Encoder), passes, example_inputs=inputs, measure=False)
                    for passes in (None, "approximate"))  # fmt: skip
    assert not any(site.attributes["approximate"] == "tanh" for site in exact.folded.sites("gelu"))
    record = next(one for one in small.report.passes if one.name == "approximate")
    assert (record.changed, record.declined) == (2, {})
    (agreement,) = record.agreement
    assert 40 < agreement.sqnr < 120
    assert not torch.equal(exact(**inputs), small(**inputs))
