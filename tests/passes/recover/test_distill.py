"""What a student learns from a teacher: each term at its weight, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import graphopt
from graphopt import Optimized
from graphopt.passes import REGISTRY, Distill
from graphopt.pipeline.text import parse
from tests.models import Encoder, exported, padding, seeded, tokens
from tests.passes.recover.students import (
    FEEDS,
    Bare,
    Classifier,
    Mlp,
    Small,
    Span,
    Teacher,
    X,
    Y,
    bert,
    captured,
    distilled,
    made,
)
from tests.training.networks import Dropping, batches, dropping

INPUTS = [x for x, _ in batches()]
REAL = FEEDS["mask"].bool()


def first_line(kind: Any, data: Any, **options: Any) -> dict[str, float]:
    """The loss and its terms of a student whose teacher has other weights, before a weight has moved."""
    return distilled(captured(kind, 0), captured(kind, 1), [data], steps=1, lr=1e-12, **options).lines[0]


def both(kind: Any, **feeds: Tensor) -> tuple[Any, Any]:
    """What that student and its teacher return."""
    with torch.no_grad():
        return made(kind, 0)(**feeds), made(kind, 1)(**feeds)


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    p, q = ((x.double() / temperature).softmax(-1) for x in (teacher, student))
    return (p * (p / q).log()).sum(-1)


# --- the terms -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(
    alpha=st.sampled_from([0.0, 0.25, 0.7]),
    temperature=st.sampled_from([1.0, 3.0]),
    label_smoothing=st.sampled_from([0.0, 0.1]),
)
def test_hard_and_soft_are_weighted_to_one(alpha: float, temperature: float, label_smoothing: float) -> None:
    smoothing = label_smoothing if alpha else 0.0
    line = first_line(Mlp, (X, Y), alpha=alpha, temperature=temperature, label_smoothing=smoothing)
    ours, theirs = both(Mlp, x=X)
    hard = F.cross_entropy(ours["logits"].double(), Y, label_smoothing=smoothing)
    soft = temperature**2 * kl(theirs["logits"], ours["logits"], temperature).mean()
    assert line["loss"] == pytest.approx(float(alpha * hard + (1 - alpha) * soft), rel=1e-4)
    if alpha:
        assert line["hard"] == pytest.approx(float(alpha * hard), rel=1e-4)
        assert line["soft"] == pytest.approx(float((1 - alpha) * soft), rel=1e-4)


def test_soft_labels_stand_beside_a_teacher() -> None:
    shares = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    line = first_line(Mlp, (X, shares), alpha=0.5, temperature=2.0)
    ours, _ = both(Mlp, x=X)
    hard = -(shares * ours["logits"].log_softmax(-1)).sum(-1).mean()
    assert line["hard"] == pytest.approx(0.5 * float(hard), rel=1e-4)


def test_logits_of_positions_are_compared_over_real_tokens() -> None:
    ours, theirs = both(Span, **FEEDS)
    found = [
        kl(theirs[name][row, REAL[row]], ours[name][row, REAL[row]])
        for name in ("start_logits", "end_logits")
        for row in range(3)
    ]
    assert first_line(Span, FEEDS)["loss"] == pytest.approx(float(torch.stack(found).mean()), rel=1e-4)


def test_classes_are_no_positions_where_there_are_as_many() -> None:
    ours, theirs = both(Classifier, **FEEDS)
    expected = kl(theirs["logits"], ours["logits"]).mean()
    assert first_line(Classifier, FEEDS)["loss"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("cosine", "similarity"), [(0, 0), (2, 0), (0, 3), (0.5, 0.25)])
def test_embeddings_are_compared_by_token_by_sentence_and_by_batch(cosine: float, similarity: float) -> None:
    line = first_line(Small, FEEDS, form="embedding", cosine=cosine, similarity=similarity)
    ours, theirs = (one.double() for one in both(Small, **FEEDS))
    expected = ((ours - theirs)[REAL] ** 2).mean() / (theirs[REAL] ** 2).mean()
    a, b = (torch.stack([x[row, REAL[row]].mean(0) for row in range(3)]) for x in (ours, theirs))
    expected += cosine * (1 - F.cosine_similarity(a, b)).mean()
    a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    expected += similarity * ((a @ a.T - b @ b.T) ** 2).mean()
    assert line["loss"] == pytest.approx(float(expected), rel=1e-4)


@contextmanager
def results_of(module: nn.Module, *paths: str) -> Iterator[dict[str, Tensor]]:
    """What modules inside return, by path, when the whole is called."""
    found: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        def keep(_: nn.Module, given: Any, result: Any) -> None:
            found[path] = (result[0] if isinstance(result, tuple) else result).detach().double()

        return keep

    hooks = [module.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    yield found
    for one in hooks:
        one.remove()


@pytest.mark.slow
def test_blocks_and_relations_of_a_bert() -> None:
    """Against forward hooks: the results of both layers; queries, keys and values of the last, in 8 parts."""
    feeds = {"input_ids": FEEDS["ids"], "attention_mask": FEEDS["mask"]}
    layers = ["encoder.layer.0", "encoder.layer.1"]
    projected = [f"encoder.layer.1.attention.self.{name}" for name in ("query", "key", "value")]
    seen = []
    for seed in (0, 1):
        with results_of(module := made(bert, seed), *layers, *projected) as found, torch.no_grad():
            module(**feeds)
        seen.append(found)
    a, b = seen
    hidden = [float(((a[path] - b[path])[REAL] ** 2).mean() / (b[path][REAL] ** 2).mean()) for path in layers]
    divergences = []
    for path in projected:
        for row in range(3):
            for first in range(0, 32, 4):
                x, y = (one[path][row, REAL[row], first : first + 4] for one in (a, b))
                divergences.append(kl(y @ y.T / 2, x @ x.T / 2))
    line = first_line(
        bert, feeds, hidden=3.0, relations=5.0, outputs=("last_hidden_state",), cosine=0.0, similarity=0.0
    )
    assert line["hidden"] == pytest.approx(3 * sum(hidden) / 2, rel=1e-4)
    assert line["soft"] == pytest.approx(hidden[-1], rel=1e-4)
    assert line["relations"] == pytest.approx(5 * float(torch.cat(divergences).mean()), rel=1e-4)
    assert line["loss"] == pytest.approx(line["hidden"] + line["soft"] + line["relations"], rel=1e-6)


# --- students ------------------------------------------------------------------------------------------------------


def optimize(model: Any, passes: str, example: Any = None, **options: Any) -> Optimized:
    return graphopt.optimize(model, passes, example_inputs=example, target="torch-cpu", agree=False, **options)


def lines(small: Optimized) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = next(record for record in small.report.passes if record.name == "distill").training
    return found


def same(a: Optimized, b: Optimized) -> bool:
    ours, theirs = (dict(one.transformed.constants()) for one in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_pruned_student_is_matched_by_module_path() -> None:
    feeds = [{"ids": tokens(4, seed=seed), "mask": padding(4)} for seed in range(3)]
    passes = "prune{neurons=0.5},distill{epochs=4 lr=0.003 hidden=1 relations=1}"
    told = lines(optimize(seeded(Encoder), passes, feeds[0], training=feeds))
    assert all(set(line) == {"step", "loss", "soft", "hidden", "relations", "lr"} for line in told)
    assert all(told[-1][term] < told[0][term] for term in ("soft", "hidden"))


@pytest.mark.parametrize("width", [5, 8])
def test_a_student_of_its_own_architecture(width: int) -> None:
    """Blocks of other widths are compared through projections, which are dropped at the end."""
    student, teacher = captured(Mlp, 0, width), captured(Teacher, 1)
    options: dict[str, Any] = {"hidden": 1.0, "match": {"blocks.0": "first", "blocks.1": "last.0"}, "lr": 0.01}
    found = [distilled(student, teacher, INPUTS, epochs=8, **options) for _ in range(2)]
    assert found[0].same(found[1])
    told = found[0].lines
    assert told[-1]["hidden"] < told[0]["hidden"] and told[-1]["soft"] < told[0]["soft"]
    shapes = [tensor.shape for _, tensor in student.graph.constants()]
    assert [tensor.shape for _, tensor in found[0].graph.constants()] == shapes
    seeded_otherwise = distilled(student, teacher, INPUTS, epochs=8, seed=1, **options)
    assert found[0].same(seeded_otherwise) == (width == 8)  # nothing but the projections is random here


def test_matches_in_the_text_form() -> None:
    one = parse("distill{hidden=1 match={encoder.layer.0=blocks.0 encoder.layer.1=1 0=none}}", REGISTRY)
    match = {"encoder.layer.0": "blocks.0", "encoder.layer.1": "1", "0": "none"}
    (pass_,) = one.passes
    assert isinstance(pass_, Distill) and pass_ == Distill(hidden=1, match=match) and dict(pass_.match or {}) == match
    assert parse(str(one), REGISTRY) == one
    nothing = parse("distill{match=none cache=none}", REGISTRY).passes[0]
    assert isinstance(nothing, Distill) and nothing.match is None and nothing.cache is None
    told = lines(optimize(made(Mlp, 0), "distill{steps=2 hidden=1 match={blocks.0=first}}", X, training=INPUTS,
                          teacher=made(Teacher, 1)))  # fmt: skip
    assert [sorted(line) for line in told] == [["hidden", "loss", "lr", "soft", "step"]] * 2


# --- teachers ------------------------------------------------------------------------------------------------------


def test_a_teacher_of_any_kind_teaches_the_same(tmp_path: Path) -> None:
    teacher = made(Bare, 1)
    proto = exported(teacher, {"x": X}, 18, dynamo=False)
    onnx.save(proto, tmp_path / "teacher.onnx")
    kinds: dict[str, Any] = {
        "module": teacher, "fx": fx.symbolic_trace(teacher).eval(), "proto": proto, "path": tmp_path / "teacher.onnx",
        "text": str(tmp_path / "teacher.onnx"),
    }  # fmt: skip
    student = optimize(made(Mlp, 0), "", X)
    found = {
        kind: optimize(student, "distill{epochs=2 lr=0.01}", training=INPUTS, teacher=one)
        for kind, one in kinds.items()
    }
    assert same(found["module"], found["fx"])
    assert same(found["proto"], found["path"]) and same(found["path"], found["text"])
    for (name, a), (_, b) in zip(*(found[kind].transformed.constants() for kind in ("module", "proto")), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


def test_training_changes_neither_the_model_nor_the_teacher() -> None:
    model, sharing = dropping(), Dropping().eval()
    sharing.first = model.first  # the same tensors
    modules = (model, sharing)
    before = [{name: one.clone() for name, one in module.state_dict().items()} for module in modules]
    results = []
    for teacher in (model, sharing, None):
        results.append(optimize(model, "distill{epochs=2 lr=0.05}", X, training=INPUTS, teacher=teacher))
        for module, known in zip(modules, before, strict=True):
            assert all(torch.equal(one, known[name]) for name, one in module.state_dict().items())
            assert all(one.requires_grad and one.grad is None for one in module.parameters())
            assert not any(inner.training for inner in module.modules())
    assert same(results[0], results[2]) and not same(results[0], results[1])  # without one, it is its own teacher
    notes = results[2].report.passes[0].notes
    assert "nothing was cut before it: the student is its own teacher, and learns nothing new" in notes


def test_a_cache_changes_nothing(tmp_path: Path) -> None:
    """Also where what is kept are views of one tensor, and where another precision has filled the folder."""
    feeds = [{"ids": tokens(4, seed=seed), "mask": padding(4)} for seed in range(2)]

    def trained(**options: Any) -> Any:
        return distilled(captured(Small, 0), captured(Small, 1), feeds, epochs=2, lr=0.003, **options)

    without = trained(hidden=1.0)
    trained(hidden=1.0, cache=str(tmp_path), amp="bfloat16")
    assert len(list(tmp_path.iterdir())) == 2
    for _ in range(2):
        assert trained(hidden=1.0, cache=str(tmp_path)).same(without)
        assert len(list(tmp_path.iterdir())) == 4
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    trained(hidden=2.0, cache=str(tmp_path))
    assert kept == {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
