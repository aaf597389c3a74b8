"""The loss that passes follow and train on: the user's, or the cross-entropy to labels where the user gives none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.analysis.masks import is_mask, padding_mask
from graphopt.errors import UsageError, user_code
from graphopt.ir.graph import Feeds, dtype_name
from graphopt.pipeline.batches import Batch

Loss = Callable[[Any, Any], Tensor]
"""(what the model returns, the batch that it was fed) -> one number, the mean over the batch."""

IGNORED = -100
"""The label of positions that are left out."""

_SPAN = ("start", "end")


def followed(loss: Loss | None) -> Callable[..., Tensor]:
    """The user's loss, which is given the batch as the user made it; None is the cross-entropy to its labels."""
    if loss is None:
        return cross_entropy
    call = user_code("loss function", loss)

    def users(outputs: Any, batch: Batch, **options: Any) -> Tensor:
        if options:
            names = f"{' and '.join(options)} {'are' if len(options) > 1 else 'is'}"
            raise UsageError(f"{names} of the built-in cross-entropy, and loss= is your own: leave one of them out")
        loss = call(outputs, batch.raw)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = f"a tensor of {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise UsageError(f"your loss function gives {given}; give a tensor of one number, the mean over the batch")
        return loss.reshape(())

    return users


def cross_entropy(
    outputs: Any, batch: Batch, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """The mean cross-entropy of what a model returns to the labels of a batch; -100 and padding are left out.

    outputs: the logits are the one called logits, else the first in floats. Labels are integers (...) for logits
    (..., classes), or for (batch, classes, ...); floats of the logits' shape whose rows sum to 1 (soft labels); other
    floats, for which it is the mean squared error; or a dict of start_positions and end_positions, for the outputs
    start_logits and end_logits. Labels that are the token ids of the input are those of the next position (a language
    model), and so is a batch without labels whose logits are as many as its token ids.
    label_smoothing: Szegedy et al. 2016, section 7. class_weights: one for each class, of the logits' last axis or of
    axis 1; the mean is then weighted.
    Raises UsageError where there are no labels, and where they do not fit the logits or the options.
    """
    named = _named(outputs)
    labels = batch.labels
    if isinstance(labels, Mapping):
        if class_weights is not None:
            raise UsageError("class_weights weigh classes, and the labels are positions in a text: leave them out")
        return _spans(named, labels, label_smoothing)
    logits = logits_of(named)
    ids = _token_ids(batch.feeds, logits)
    if labels is None and ids is not None and int(ids.max()) < logits.shape[-1]:  # else they are no vocabulary's
        labels = ids
    if labels is None:
        raise UsageError(
            "no loss: pass loss=<function of (outputs, batch)>, or batches with labels (dicts that hold 'labels', or "
            "tuples of inputs and labels)"
        )
    if not isinstance(labels, Tensor) or labels.is_complex():
        held = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
        raise UsageError(
            f"the labels are {held}, and cross-entropy takes a tensor: pass loss=<function of (outputs, batch)>"
        )
    labels = labels.to(logits.device)
    if labels.is_floating_point():
        return _to_floats(logits, labels, label_smoothing, class_weights)
    real = padding_mask(batch.feeds)
    if real is not None and real.shape == labels.shape:
        labels = labels.masked_fill(~real.to(labels.device), IGNORED)
    if ids is not None and _are_token_ids(labels, ids.to(labels.device)):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return _to_classes(logits, labels, label_smoothing, class_weights)


def wide(x: Tensor) -> Tensor:
    """Floats of at least 32 bits, in which losses are computed: float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def logits_of(outputs: Mapping[str, Tensor]) -> Tensor:
    """The output called logits, else the first that holds floats."""
    floats = [one for one in outputs.values() if one.is_floating_point()]
    if not floats:
        raise UsageError(f"no output holds floats to compare with labels ({', '.join(outputs)})")
    return outputs.get("logits", floats[0])


def _named(outputs: Any) -> dict[str, Tensor]:
    """What a model returned, by name; without names, by place."""
    if isinstance(outputs, Mapping):
        return {str(name): one for name, one in outputs.items() if isinstance(one, Tensor)}
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return {str(place): leaf for place, leaf in enumerate(leaves)}


def _token_ids(feeds: Feeds, logits: Tensor) -> Tensor | None:
    """The integer input of the logits' leading shape (batch, length); None where there is none."""
    if logits.dim() != 3:
        return None
    fitting = [name for name, feed in feeds.items() if feed.shape == logits.shape[:2] and not feed.is_floating_point()
               and not is_mask(name) and "type" not in name.lower()]  # fmt: skip
    return feeds[fitting[0]] if fitting else None


def _are_token_ids(labels: Tensor, ids: Tensor) -> bool:
    """Whether labels are the input itself, where they are not left out.

    That must be in runs: of a masked language model a few tokens here and there count, and some are the input's.
    """
    if labels.shape != ids.shape:
        return False
    counted = labels != IGNORED
    in_runs = 2 * int((counted[:, 1:] & counted[:, :-1]).sum()) >= int(counted.sum())
    return bool(counted.any()) and in_runs and bool((labels == ids)[counted].all())


def _spans(outputs: Mapping[str, Tensor], labels: Mapping[str, Any], smoothing: float) -> Tensor:
    """Question answering: the mean of the losses of the start and of the end; answers outside of the text are left
    out."""
    total = []
    for side in _SPAN:
        logits, where = outputs.get(f"{side}_logits"), labels.get(f"{side}_positions")
        if logits is None or where is None:
            raise UsageError(
                f"the labels are {', '.join(map(str, labels))}, and the outputs {', '.join(outputs)}: question "
                "answering has start_positions and end_positions for start_logits and end_logits; for anything else "
                "pass loss=<function of (outputs, batch)>"
            )
        positions = torch.as_tensor(where, device=logits.device).flatten()
        inside = (positions >= 0) & (positions < logits.shape[-1])
        total.append(_to_classes(logits, positions.masked_fill(~inside, IGNORED), smoothing, None))
    return torch.stack(total).mean()


def _to_floats(logits: Tensor, labels: Tensor, smoothing: float, weights: Tensor | None) -> Tensor:
    if labels.shape == logits.shape and logits.shape[-1] > 1 and bool(((labels.sum(-1) - 1).abs() < 1e-3).all()):
        rows, shares = wide(logits).flatten(0, -2), wide(labels).flatten(0, -2).to(wide(logits).dtype)
        return F.cross_entropy(rows, shares, _fitting(weights, logits), label_smoothing=smoothing)
    if smoothing or weights is not None:
        raise UsageError(
            f"the labels are {list(labels.shape)} floats, whose loss is the squared error: leave label_smoothing and "
            "class_weights out, or give classes as integers"
        )
    if labels.numel() != logits.numel():
        raise UsageError(f"labels of {list(labels.shape)} floats do not fit an output of {list(logits.shape)}")
    return F.mse_loss(wide(logits).flatten(), labels.flatten().to(wide(logits).dtype))


def _to_classes(logits: Tensor, labels: Tensor, smoothing: float, weights: Tensor | None) -> Tensor:
    # Where both axes fit, classes of images are along axis 1, as torch has them, and those of tokens along the last.
    along_1 = labels.shape == logits.shape[:1] + logits.shape[2:]
    if along_1 and (logits.dim() > 3 or labels.shape != logits.shape[:-1]):
        logits = logits.movedim(1, -1)
    if labels.numel() != logits[..., 0].numel():
        raise UsageError(
            f"labels {list(labels.shape)} {dtype_name(labels.dtype)} do not fit logits {list(logits.shape)}: give one "
            "class for each row of logits"
        )
    labels = labels.flatten().long()
    counted, classes = labels[labels != IGNORED], logits.shape[-1]
    if not counted.numel():
        return logits.sum() * 0.0  # a batch without labels teaches nothing
    if not 0 <= int(counted.min()) <= int(counted.max()) < classes:
        wrong = int(counted.min()) if int(counted.min()) < 0 else int(counted.max())
        raise UsageError(
            f"a label is {wrong}, and the model has {classes} classes, 0 to {classes - 1}; {IGNORED} is for what is "
            "left out"
        )
    return F.cross_entropy(
        wide(logits).flatten(0, -2), labels, _fitting(weights, logits), ignore_index=IGNORED,
        label_smoothing=smoothing,
    )  # fmt: skip


def _fitting(weights: Tensor | None, logits: Tensor) -> Tensor | None:
    """The weights of classes, which the last axis of the logits must have as many of."""
    if weights is None:
        return None
    if len(weights) != logits.shape[-1]:
        raise UsageError(f"class_weights are {len(weights)} numbers, and the model has {logits.shape[-1]} classes")
    return weights.to(logits.device, wide(logits).dtype)
