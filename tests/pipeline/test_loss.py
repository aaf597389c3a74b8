"""The loss that is followed where the user gives none, and what the user's own is given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.pipeline.batches import Batch
from graphopt.pipeline.loss import IGNORED, cross_entropy, followed

LOGITS = torch.tensor([[[2.0, 0.0], [0.5, 1.0]], [[0.0, 3.0], [1.0, 1.0]]])
LABELS = torch.tensor([[0, 1], [1, -100]])


def by_hand(
    rows: Tensor, shares: Tensor, weights: Tensor | None = None, smoothing: float = 0.0, *, soft: bool = False
) -> float:
    """The mean of -Σ w_c p_c log softmax(row)_c over rows (rows, classes), for the shares p of each class.

    With weights the mean of classes is over the weights of the labels, and that of soft labels over rows.
    """
    scores, p = rows.double().numpy(), shares.double().numpy()
    classes = scores.shape[-1]
    w = np.ones(classes) if weights is None else weights.double().numpy()
    p = (1 - smoothing) * p + smoothing / classes
    logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    total = -(w * p * logs).sum()
    labels = shares.argmax(-1).numpy()
    return float(total / (len(scores) if soft else w[labels].sum()))


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return torch.eye(classes)[labels]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classes(seed: int, count: int, *shape: int) -> Tensor:
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(seed))


def loss(outputs: Any, labels: Any, feeds: dict[str, Tensor] | None = None, **options: Any) -> float:
    return float(cross_entropy(outputs, Batch(feeds or {}, labels, None), **options))


WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0])
OPTIONS = st.sampled_from([{}, {"label_smoothing": 0.1}, {"class_weights": WEIGHTS}])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), options=OPTIONS)
def test_sequences(seed: int, options: dict[str, Any]) -> None:
    logits, labels = drawn(seed, 4, 5), classes(seed, 3, 4)
    expected = by_hand(logits, one_hot(labels, 5), options.get("class_weights"), options.get("label_smoothing", 0.0))
    assert loss({"hidden": labels, "logits": logits}, labels, **options) == pytest.approx(expected, rel=1e-5)
    assert loss([logits], labels.int()[:, None], **options) == pytest.approx(expected, rel=1e-5)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), options=OPTIONS, masked=st.booleans())
def test_tokens(seed: int, options: dict[str, Any], masked: bool) -> None:
    logits, labels = drawn(seed, 3, 6, 5), classes(seed, 3, 3, 6)
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1:, 4:] = 0
    labels[0, 0] = IGNORED
    counts = (labels != IGNORED) & (mask.bool() if masked else True)
    expected = by_hand(
        logits[counts], one_hot(labels[counts], 5), options.get("class_weights"), options.get("label_smoothing", 0.0)
    )
    feeds = {"ids": classes(seed + 1, 40, 3, 6) + 5} | ({"attention_mask": mask} if masked else {})
    assert loss(logits, labels, feeds, **options) == pytest.approx(expected, rel=1e-5)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), sizes=st.sampled_from([(6, 7), (5, 5)]))
def test_segmentation_and_classes_along_axis_1(seed: int, sizes: tuple[int, int]) -> None:
    logits, labels = drawn(seed, 2, 5, *sizes), classes(seed, 5, 2, *sizes)
    labels[0, 0] = IGNORED
    counts = labels != IGNORED
    expected = by_hand(logits.permute(0, 2, 3, 1)[counts], one_hot(labels[counts], 5))
    assert loss([logits], labels) == pytest.approx(expected, rel=1e-5)
    tokens, tags = drawn(seed, 2, 5, 6), classes(seed, 5, 2, 6)
    assert loss([tokens], tags) == pytest.approx(
        by_hand(tokens.transpose(1, 2).reshape(-1, 5), one_hot(tags.flatten(), 5)), rel=1e-5
    )


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), masked=st.booleans(), labelled=st.booleans(), prompt=st.integers(0, 3))
def test_language_models(seed: int, masked: bool, labelled: bool, prompt: int) -> None:
    """Each position's logits are of the next token; padding and the prompt are left out."""
    logits, ids = drawn(seed, 3, 8, 11), classes(seed, 11, 3, 8)
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[2, 5:] = 0
    labels = ids.clone() if labelled else None
    if labels is not None:
        labels[:, :prompt] = IGNORED
    rows, following = [], []
    for sample in range(3):
        for place in range(7):
            left_out = (masked and not mask[sample, place + 1]) or (labelled and place + 1 < prompt)
            if not left_out:
                rows.append(logits[sample, place])
                following.append(ids[sample, place + 1])
    expected = by_hand(torch.stack(rows), one_hot(torch.stack(following), 11))
    feeds = {"input_ids": ids} | ({"attention_mask": mask} if masked else {})
    assert loss({"logits": logits}, labels, feeds) == pytest.approx(expected, rel=1e-5)


def test_masked_language_models_have_no_next_token() -> None:
    """Also where the tokens to be found in a batch happen to be those that were left as they are."""
    logits, ids = drawn(0, 2, 8, 11), classes(0, 11, 2, 8)
    labels = torch.full_like(ids, IGNORED)
    labels[0, 2], labels[1, 6] = ids[0, 2], ids[1, 6]
    expected = by_hand(torch.stack([logits[0, 2], logits[1, 6]]), one_hot(torch.stack([ids[0, 2], ids[1, 6]]), 11))
    assert loss(logits, labels, {"input_ids": ids}) == pytest.approx(expected, rel=1e-5)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), outside=st.booleans())
def test_question_answering(seed: int, outside: bool) -> None:
    start, end = drawn(seed, 3, 7), drawn(seed + 1, 3, 7)
    labels = {"start_positions": classes(seed, 7, 3), "end_positions": classes(seed + 1, 7, 3)}
    counts = torch.tensor([True, True, not outside])
    if outside:
        labels["start_positions"][2], labels["end_positions"][2] = 7, -1
    losses = [
        by_hand(logits[counts], one_hot(positions[counts], 7))
        for logits, positions in zip((start, end), labels.values(), strict=True)
    ]
    found = loss({"start_logits": start, "end_logits": end}, {**labels, "offsets": [1]})
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), options=OPTIONS)
def test_soft_labels(seed: int, options: dict[str, Any]) -> None:
    logits, shares = drawn(seed, 4, 5), drawn(seed + 1, 4, 5).softmax(-1)
    weights, smoothing = options.get("class_weights"), options.get("label_smoothing", 0.0)
    expected = by_hand(logits, shares, weights, smoothing, soft=True)
    assert loss(logits, shares, **options) == pytest.approx(expected, rel=1e-5)


def test_regression() -> None:
    outputs, labels = drawn(0, 6, 1), drawn(1, 6)
    expected = float(((outputs[:, 0] - labels) ** 2).mean())
    assert loss(outputs, labels) == loss(outputs, labels[:, None]) == pytest.approx(expected, rel=1e-6)
    several, targets = drawn(0, 6, 3), drawn(1, 6, 3)
    assert loss(several, targets) == pytest.approx(float(((several - targets) ** 2).mean()), rel=1e-6)


def test_a_batch_whose_labels_are_all_left_out_teaches_nothing() -> None:
    logits = drawn(0, 4, 5).requires_grad_()
    found = cross_entropy(logits, Batch({}, torch.full((4,), IGNORED), None))
    found.backward()  # type: ignore[no-untyped-call]
    assert float(found.detach()) == 0 and logits.grad is not None and not logits.grad.any()


TEN = torch.arange(10.0).reshape(2, 5)


@pytest.mark.parametrize(
    ("outputs", "labels", "options", "message"),
    [
        (LOGITS, None, {}, "no loss: pass loss=.*or batches with labels"),
        (LOGITS, ["good"], {}, "the labels are list, and cross-entropy takes a tensor"),
        (LOGITS, torch.tensor([1j]), {}, "the labels are torch.complex64"),
        (LOGITS, {"start_positions": LABELS}, {}, "question answering has start_positions and end_positions"),
        (LOGITS, torch.tensor([0, 1, 1]), {}, r"labels \[3\] int64 do not fit logits \[2, 2, 2\]: give one class for"),
        (LOGITS, torch.tensor([0.5, 1.5, 1]), {}, r"labels of \[3\] floats do not fit an output of \[2, 2, 2\]"),
        (TEN, torch.tensor([0, 5]), {}, "a label is 5, and the model has 5 classes, 0 to 4; -100 is for what is left"),
        (TEN, torch.tensor([0, -1]), {}, "a label is -1, and the model has 5 classes"),
        (TEN, torch.tensor([0, 1]), {"class_weights": torch.ones(4)}, r"class_weights are 4 numbers, .* has 5 classes"),
        (TEN, TEN.softmax(-1), {"class_weights": torch.ones(4)}, "class_weights are 4 numbers"),
        (TEN, TEN, {"class_weights": torch.ones(5)}, "whose loss is the squared error: leave label_smoothing and"),
        (TEN, TEN, {"label_smoothing": 0.1}, "whose loss is the squared error"),
        (LOGITS, {"start_positions": LABELS}, {"class_weights": torch.ones(5)}, "the labels are positions in a text"),
        ([LABELS], LABELS, {}, "no output holds floats to compare with labels"),
    ],
)  # fmt: skip
def test_refuses_what_does_not_fit(outputs: Any, labels: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cross_entropy(outputs, Batch({}, labels, None), **options)


def test_token_ids_that_no_vocabulary_holds_are_no_labels() -> None:
    with pytest.raises(UsageError, match="no loss: pass loss="):
        cross_entropy(drawn(0, 2, 7, 11), Batch({"ids": classes(0, 40, 2, 7) + 5}, None, None))


def test_the_users_loss_is_given_the_users_batch() -> None:
    raw = (LOGITS, LABELS)
    assert followed(lambda outputs, batch: torch.tensor(float(batch is raw)))(LOGITS, Batch({}, LABELS, raw)) == 1
    assert followed(None) is cross_entropy
    with pytest.raises(UsageError, match="your loss function failed: IndexError"):
        followed(lambda outputs, batch: batch[2])(LOGITS, Batch({}, LABELS, raw))
    with pytest.raises(UsageError, match="label_smoothing is of the built-in cross-entropy, and loss= is your own"):
        followed(lambda outputs, batch: outputs.sum())(LOGITS, Batch({}, LABELS, raw), label_smoothing=0.1)


@pytest.mark.parametrize(
    ("gives", "what"), [(LOGITS, r"a tensor of \[2, 2, 2\]"), (0.5, "a float"), (None, "a NoneType")]
)
def test_the_users_loss_is_one_number(gives: Any, what: str) -> None:
    with pytest.raises(UsageError, match=f"your loss function gives {what}; give a tensor of one number"):
        followed(lambda outputs, batch: gives)(LOGITS, Batch({}, LABELS, None))
    assert followed(lambda outputs, batch: LOGITS.mean().reshape(1, 1))(LOGITS, Batch({}, LABELS, None)).shape == ()
