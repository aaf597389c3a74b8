"""all-MiniLM-L6-v2 through target fbgemm: against PyTorch eager in fp32, and with the onnxruntime target's integers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import graphopt
from benchmarks import sentences
from benchmarks.case import Settings, checked, table, times
from benchmarks.cases.minilm import SHAPES
from benchmarks.models import Batch, minilm
from graphopt.backends.measure import geometric_mean, paired
from graphopt.graph import Graph

PASSES = "quantize{scheme=dynamic}"


def run(settings: Settings) -> bool:
    model, tokens = minilm(), sentences.tokenizer()
    shapes = {f"{batch}x{length}": sentences.filled(tokens, batch, length) for batch, length in SHAPES}
    examples = list(shapes.values())
    small = graphopt.optimize(model, PASSES, target="fbgemm", example_inputs=examples, threads=settings.threads)
    onnx = graphopt.optimize(model, PASSES, example_inputs=examples, threads=settings.threads)

    def eager(batch: Batch) -> object:
        with torch.inference_mode():
            return model(**batch)

    rows = table("times as fast as PyTorch eager in fp32, with 95% intervals", "", *shapes, "geometric mean")
    calls = {"eager": eager, "control": eager, "graphopt fbgemm dynamic": lambda batch: small(**batch)}
    found = [
        paired({name: functools.partial(call, batch) for name, call in calls.items()}, baseline="eager",
               rounds=settings.rounds)
        for batch in shapes.values()
    ]  # fmt: skip
    for name in ("control", "graphopt fbgemm dynamic"):
        ratios = [one[name] for one in found]
        rows.add_row(name, *map(times, ratios), f"{geometric_mean(ratio.median for ratio in ratios):.2f}")
    settings.console.print(rows)
    faster = all(one["graphopt fbgemm dynamic"].median > 1 for one in found)
    ours, theirs = integer_weights(small.graph), integer_weights(onnx.graph)
    equal = [path for path in ours if path in theirs and torch.equal(ours[path], theirs[path])]
    same = len(equal) == len(ours) == len(theirs) > 0
    verdict = f"integer weights equal to the onnxruntime target's: {len(equal)} of {len(ours)} and {len(theirs)}"
    settings.console.print(checked(verdict, same))
    return faster and same


def integer_weights(graph: Graph) -> dict[str, Tensor]:
    """By module path, the int8 matrices (out, in) that the graph reads."""
    found: dict[str, Tensor] = {}
    for node in graph.nodes:
        for value in node.operands:
            if value is not None and value.is_constant and value.dtype == torch.int8 and value.rank == 2:
                tensor = graph.constant(value)
                assert tensor is not None
                found[node.path] = tensor
    return found
