"""all-MiniLM-L6-v2 through target fbgemm: against PyTorch eager in fp32, and with the onnxruntime target's integers."""

from __future__ import annotations

import functools
from collections import Counter

import torch

import graphopt
from benchmarks import sentences
from benchmarks.case import Settings, checked, table, times
from benchmarks.models import Batch, minilm
from benchmarks.networks import SHAPES
from graphopt.ir.graph import Graph
from graphopt.measure.timing import geometric_mean, paired

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
    ours, theirs = integer_rows(small.folded), integer_rows(onnx.folded)
    common, same = (ours & theirs).total(), ours == theirs and ours.total() > 0
    verdict = f"rows of integer weights (one per output) equal to the onnxruntime target's: {common} of {ours.total()}"
    settings.console.print(checked(verdict, same))
    return faster and same


def integer_rows(graph: Graph) -> Counter[bytes]:
    """Every row of the int8 matrices (out, in) that linears read: the same whether they were merged or not."""
    weights = {node.operand("weight") for node in graph.sites("linear_int8")}
    weights |= {node.input for node in graph.sites("dequantize") if node.operand("zero_point") is None}
    rows: Counter[bytes] = Counter()
    for value in weights:
        tensor = None if value is None else graph.constant(value)
        if tensor is not None:
            rows.update(row.numpy().tobytes() for row in tensor.contiguous())
    return rows
