"""Inserts nodes into an `FxGraph`: ops, copies of nodes, calls of any operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, fx

from graphopt.dialects.fx import spellings as fx_spellings
from graphopt.dialects.fx.native import Native, is_value, meta, target_name, tensors_read, with_nodes
from graphopt.dialects.fx.spellings import Literal, Raw, Sizes
from graphopt.errors import GraphError
from graphopt.ir.ops import OPS


class NodeWriter:
    """Inserts nodes just before `at` (at the end without it), under its module path. A `spellings.Writer`."""

    def __init__(self, native: Native, at: fx.Node | None = None) -> None:
        self._native, self._at = native, native.output if at is None else at

    def op(self, name: str, raws: Sequence[Raw], attributes: Mapping[str, Any]) -> fx.Node:
        """An op, its operands and attributes checked against the declaration."""
        op = OPS[name]
        names = op.names(len(raws))
        if len(raws) > len(names):
            raise GraphError(f"{name} takes {', '.join(op.operands)}; there are {len(raws)} operands")
        if unknown := sorted(set(attributes) - set(op.attributes)):
            raise GraphError(f"{name} has no attribute {unknown}; it has {list(op.attributes)}")
        complete = [*raws, *[None] * (len(names) - len(raws))]
        for operand, raw in zip(names, complete, strict=True):
            if raw is None and operand not in op.optional:
                raise GraphError(f"{name} needs its operand {operand!r}")
        return fx_spellings.write(self, name, complete, dict(op.attributes) | dict(attributes))

    def copy(self, node: fx.Node, raws: Sequence[Raw], changed: Mapping[str, Any] = MappingProxyType({})) -> fx.Node:
        """The same operation on other values, in the order in which it reads them; `changed`: other arguments."""
        if len(raws) != len(tensors_read(node)):
            raise GraphError(f"{target_name(node)} reads {len(tensors_read(node))} values, not {len(raws)}")
        waiting = iter(raws)

        def other(read: fx.Node) -> Any:
            if not is_value(read):
                return read
            raw = next(waiting)
            takes_number = isinstance(raw, Literal) and not isinstance(meta(read), Tensor)
            return raw.number if takes_number else self.tensor(raw)  # type: ignore[union-attr]

        args, kwargs = with_nodes((node.args, node.kwargs), other)
        if changed:
            names = [parameter.name for parameter in cast(Any, node.target)._schema.arguments]
            given = dict(zip(names, args, strict=False)) | kwargs | dict(changed)
            args = [given.pop(name) for name in names[: len(args)]]
            kwargs = given
        return self.call(cast(Callable[..., Any], node.target), *args, **kwargs)

    def operator(self, kind: str, raws: Sequence[Raw], attributes: Mapping[str, Any]) -> fx.Node:
        """A call of the operator that torch.ops has under a name such as aten.topk.default."""
        found: Any = torch.ops
        for part in kind.split("."):
            found = getattr(found, part, None)
        if not isinstance(found, torch._ops.OpOverload):
            raise GraphError(f"fx cannot emit {kind!r}: it is no op, and no operator of torch.ops with its overload")
        return self.call(found, *map(self.tensor, raws), **attributes)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self._native.call(target, args, kwargs, self._at)

    def tensor(self, raw: Raw) -> fx.Node | None:
        if raw is None or isinstance(raw, fx.Node):
            return raw
        tensor = self.constant(raw)
        if tensor is None:
            raise GraphError("a shape that is computed is no tensor in fx")
        return self.add(tensor)

    def constant(self, raw: Raw) -> Tensor | None:
        if isinstance(raw, fx.Node):
            return self._native.tensor(raw)
        if isinstance(raw, Literal):
            return torch.tensor(raw.number, dtype=raw.dtype)
        if isinstance(raw, Sizes) and all(isinstance(item, int) for item in raw.items):
            return torch.tensor(raw.items, dtype=torch.int64)
        return None

    def add(self, tensor: Tensor) -> fx.Node:
        return self._native.add_constant(tensor)
