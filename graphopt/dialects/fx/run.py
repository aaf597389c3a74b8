"""Runs a native fx graph node by node, as far as the fetched values need it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, fx

from graphopt.dialects.fx.native import Native, needed, target_name, with_nodes
from graphopt.errors import GraphError

Mark = Callable[[fx.Node, Any], Any]
"""Called with each node and its value; returns the value to go on with."""


def run(
    native: Native, feeds: Mapping[str, Tensor], fetch: Sequence[fx.Node], mark: Mark | None = None
) -> dict[fx.Node, Any]:
    """As `steps`, with all values at once."""
    return dict(steps(native, feeds, fetch, mark))


def steps(
    native: Native, feeds: Mapping[str, Tensor], fetch: Sequence[fx.Node], mark: Mark | None = None
) -> Iterator[tuple[fx.Node, Any]]:
    """The values of the nodes in `fetch`, each as soon as it is computed. Each value is freed after its last use.

    feeds: by input name; inputs that `fetch` does not depend on may be left out. Raises GraphError where one is
    missing, and, naming the node, where an operation fails.
    """
    order, fetched = needed(fetch), set(fetch)
    inputs = [str(node.meta["input_name"]) for node in order if node.op == "placeholder"]
    if missing := [name for name in inputs if name not in feeds]:
        raise GraphError(f"no feed for the inputs {missing}")
    last = {read: node for node in order for read in node.all_input_nodes}
    values: dict[fx.Node, Any] = {}
    for node in order:
        value = _compute(native, node, values, feeds)
        values[node] = value if mark is None else mark(node, value)
        if node in fetched:
            yield node, values[node]
        for read in (*node.all_input_nodes, node):
            if last.get(read, node) is node:
                values.pop(read, None)


def _compute(native: Native, node: fx.Node, values: Mapping[fx.Node, Any], feeds: Mapping[str, Tensor]) -> Any:
    if node.op == "placeholder":
        return feeds[node.meta["input_name"]]
    if node.op == "get_attr":
        return native.stored[str(node.target)]
    args, kwargs = with_nodes((node.args, node.kwargs), values.__getitem__)
    try:
        return cast(Callable[..., Any], node.target)(*args, **kwargs)
    except Exception as error:
        raise GraphError(f"{node.name} ({target_name(node)}) failed: {error}") from error
