"""Runs a lowered fx graph eagerly, with as little Python as possible between the kernels.

Weights are packed once, scales and zero points are Python numbers (`packing`), and aten's operators are called by the
bindings that torch's own functions use (`bindings`): a call takes 4 microseconds less than one of an OpOverload.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.backends.torch_cpu.packing import Pack, Packing
from graphopt.dialects.fx.graph import FxGraph, FxNode
from graphopt.dialects.fx.native import meta
from graphopt.lowering.backend import Runner

PROFILED = 7
"""Runs that a profile takes the median of, after one to warm up."""

FLOAT_OPERATORS = ("graphopt_onednn.linear_float.default",)
"""Operators of targets that compute in floats."""

INT8_OPS = ("linear_int8", "conv_int8", "add_int8")


class EagerRunner(Runner):
    """A graph with packed weights, run as the Python code that torch.fx generates from it."""

    def __init__(self, graph: FxGraph, operators: Mapping[str, Pack], threads: int | None) -> None:
        graph = graph.clone()
        _drop_identities(graph)
        nodes = graph.nodes
        self.promised = [node.label for node in nodes if node.kind in operators and node.kind not in FLOAT_OPERATORS]
        """The int8 operators of the target, by label."""
        self.unlowered = [node.label for node in nodes if node.kind in INT8_OPS]
        """Int8 ops that no rule took: the reference runs them, slowly."""
        self._names, self._threads = graph.input_names, threads
        self._sizes = [_example(meta(node)) for node in graph.native.graph.find_nodes(op="placeholder")]
        self._module = Packing(graph, operators).module(graph)
        self._labels = {node.name: _label(FxNode(graph, node)) for node in self._module.graph.nodes}
        self._run = self._module.forward

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        with _threads(self._threads), torch.inference_mode():
            return list(self._run(*[feeds[name] for name in self._names]))

    def kernels(self) -> dict[str, int]:
        """The operators of torch that one run calls, most frequent first, on zeros of the shapes that were traced.

        Composite operators count as what they call: a float linear as aten.addmm, attention as the kernel that torch
        chose.
        """
        shapes = zip(self._names, self._sizes, strict=True)
        feeds = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in shapes}
        with torch.no_grad(), _Calls() as calls:
            self._run(*feeds.values())
        return dict(calls.counts.most_common())

    def profile(self, feeds: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Median seconds of PROFILED runs for each node; a name is the module path and the node's own name."""
        seconds: dict[str, list[float]] = defaultdict(list)
        given = [feeds[name] for name in self._names]
        with _threads(self._threads), torch.inference_mode():
            for _ in range(PROFILED + 1):
                clock = _Clock(self._module, self._labels)
                clock.run(*given)
                for name, taken in clock.seconds.items():
                    seconds[name].append(taken)
        return {name: median(several[1:]) for name, several in seconds.items()}


class _Clock(fx.Interpreter):
    """Seconds of each call of one run."""

    def __init__(self, module: fx.GraphModule, labels: Mapping[str, str]) -> None:
        super().__init__(module)
        self.seconds: dict[str, float] = {}
        self._labels = labels

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_method"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        function = n.target if n.op == "call_function" else getattr(type(args[0]), str(n.target))
        start = time.perf_counter()
        result = cast(Callable[..., Any], function)(*args, **kwargs)
        self.seconds[self._labels[n.name]] = time.perf_counter() - start
        return result


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that torch dispatches to a kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _drop_identities(graph: FxGraph) -> None:
    """Remove identities, which cost a call each; not those of a value that is written to later."""
    for node in graph.sites("identity"):
        if not node.result.is_output and all(user.signature is not None for user in node.input.users):
            graph.replace(node, node.input)
    graph.sweep()


def _label(node: FxNode) -> str:
    """The module path of a node, then its name."""
    return f"{node.path}/{node.name}" if node.path else node.name


def _example(value: Tensor) -> tuple[list[int], torch.dtype]:
    """A shape that the graph takes, with the sizes of dynamic axes at tracing, and the dtype."""
    return [size if isinstance(size, int) else int(size.node.hint) for size in value.shape], value.dtype


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is None or number == before:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
