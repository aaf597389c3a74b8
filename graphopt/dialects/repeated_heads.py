"""Attention on keys and values whose heads are repeated for groups of queries -> attention on the heads themselves.

With grouped queries (Ainslie et al., 2023) a model has fewer heads of keys and values than of queries. Exporters write
the repetition out: a new axis, an expand along it, and a reshape. The op repeats them itself, and its kernels need no
copy of the cache for that.
"""

from __future__ import annotations

import sys
from typing import Any

from graphopt.dialects.raising import Stage
from graphopt.ir.graph import Node, Value
from graphopt.ir.rewrite import Builder, Match, Pattern, Recorder, Rule

_EXPANDS = ("onnx.Expand", "aten.expand.default")
_RESHAPES = ("reshape", "onnx.Reshape")


def _attention(op: Recorder, query: Any, key: Any, value: Any, mask: Any = None) -> Pattern:
    return op.attention(query, key, value, mask, heads=0)


def _unrepeated(op: Builder, m: Match) -> Value | None:
    key, value = _before_repetition(m.key), _before_repetition(m.value)
    if key is None or value is None or key.shape is None or value.shape is None or key.shape[1] != value.shape[1]:
        return None
    return op.attention(m.query, key, value, m.mask, **m.root.attributes)


def _before_repetition(value: Value) -> Value | None:
    """(batch, heads, length, size) of which each head is repeated in `value`, right behind itself; None of others."""
    joined = value.producer
    if joined is None or joined.kind not in _RESHAPES:
        return None
    expand = _behind_copies(joined.operands[0]).producer
    if expand is None or expand.kind not in _EXPANDS:
        return None
    added = _behind_copies(expand.operands[0]).producer
    if added is None or added.kind != "unsqueeze" or added.attributes["axes"] not in ((2,), (-3,)):
        return None
    one, spread, whole = (list(shape or ()) for shape in (added.input.shape, expand.result.shape, value.shape))
    if (len(one), len(spread), len(whole)) != (4, 5, 4) or "?" in one:
        return None
    heads, groups = one[1], spread[2]
    if not isinstance(heads, int) or not isinstance(groups, int):
        return None
    if spread != [*one[:2], groups, *one[2:]] or whole != [one[0], heads * groups, *one[2:]]:
        return None
    return _behind_copies(added.input)


def _behind_copies(value: Value | None) -> Value:
    """What a value copies: through identities, and slices that take all of an axis."""
    assert value is not None  # operands of views are not left out
    while (node := value.producer) is not None and (node.kind == "identity" or _takes_all(node)):
        assert node.operands[0] is not None
        value = node.operands[0]
    return value


def _takes_all(node: Node) -> bool:
    """Whether a node is aten's slice from the first entry to the last of any axis; in ONNX there are none left."""
    given = node.attributes
    whole = node.kind == "aten.slice.Tensor" and not given["start"] and given["step"] == 1
    return whole and (given["end"] is None or given["end"] == sys.maxsize)


STAGE = Stage.of_rules("repeated heads", Rule("repeated-heads", _attention, _unrepeated))
