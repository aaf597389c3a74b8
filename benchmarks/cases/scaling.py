"""How long graphopt itself takes: on MiniLM, on deeper and deeper encoders, and on an ONNX graph of 20,000 nodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper

from benchmarks import sentences
from benchmarks.case import Settings, checked, table
from benchmarks.models import bert, minilm
from graphopt.backends import target
from graphopt.capture.sources import Captured, capture
from graphopt.passes import REGISTRY
from graphopt.pipeline.context import Context
from graphopt.pipeline.text import parse
from graphopt.report.records import PassRecord

MINILM_SECONDS = 15.0
LARGE_NODES, LARGE_SECONDS = 20_000, 20.0
LAYERS = (6, 12, 24, 48)
RUNS = 5
"""Runs of the passes at each depth; their medians are shown."""
GROWTH = 2.0
"""Most milliseconds per layer at the deepest over those at the shallowest: 1 is linear, 8 would be quadratic."""
PASSES = "simplify,sparsify{amount=0.3},low-rank{rank=0.25},quantize{scheme=dynamic},merge-linear,fold-int8"


def run(settings: Settings) -> bool:
    return all([on_minilm(settings), on_depth(settings), on_many_nodes(settings)])


def on_minilm(settings: Settings) -> bool:
    model, batch = minilm(), sentences.filled(sentences.tokenizer(), 2, 16)
    captured, capturing = timed(lambda: capture(model, "onnx", example_inputs=batch))
    records = apply("simplify,quantize{scheme=dynamic}", captured)
    total = capturing + sum(record.seconds for record in records)
    rows = table("MiniLM, seconds", "capture", *(record.name for record in records), "all", "bound")
    rows.columns[0].justify = "right"
    rows.add_row(
        f"{capturing:.2f}",
        *(f"{record.seconds:.2f}" for record in records),
        checked(f"{total:.2f}", total < MINILM_SECONDS),
        f"{MINILM_SECONDS:g}",
    )
    settings.console.print(rows)
    return total < MINILM_SECONDS


def on_depth(settings: Settings) -> bool:
    rows = table("BERT encoders of width 64, milliseconds of each pass per layer", "layers", "nodes", *names(), "all")
    per_layer: list[float] = []
    for layers in LAYERS:
        batch = {"input_ids": torch.arange(32).reshape(2, 16), "attention_mask": torch.ones(2, 16, dtype=torch.int64)}
        captured = capture(bert(layers, 64), "onnx", example_inputs=batch)
        runs = [apply(PASSES, captured) for _ in range(RUNS)]
        cells = [1000 * median(record.seconds for record in several) / layers for several in zip(*runs, strict=True)]
        per_layer.append(sum(cells))
        rows.add_row(str(layers), str(runs[0][0].nodes_before), *(f"{cell:.1f}" for cell in [*cells, per_layer[-1]]))
    settings.console.print(rows)
    growth = per_layer[-1] / per_layer[0]
    ratio, linear = growth * LAYERS[-1] / LAYERS[0], LAYERS[-1] / LAYERS[0]
    took = f"{LAYERS[-1]} layers take {ratio:.1f} times as long as {LAYERS[0]}"
    settings.console.print(checked(f"{took}; linear is {linear:g}, the bound {GROWTH * linear:g}", growth <= GROWTH))
    return growth <= GROWTH


def names() -> list[str]:
    return [one.name for one in parse(PASSES, REGISTRY).leaves()]


def on_many_nodes(settings: Settings) -> bool:
    captured, capturing = timed(lambda: capture(many_nodes(LARGE_NODES), "onnx"))
    record = apply("simplify", captured)[0]
    total = capturing + record.seconds
    title = f"an ONNX graph of {LARGE_NODES} nodes, seconds"
    rows = table(title, "capture", "simplify", "both", "bound", "nodes captured", "nodes left")
    rows.columns[0].justify = "right"
    rows.add_row(
        f"{capturing:.2f}",
        f"{record.seconds:.2f}",
        checked(f"{total:.2f}", total < LARGE_SECONDS),
        f"{LARGE_SECONDS:g}",
        str(record.nodes_before),
        str(record.nodes_after),
    )
    settings.console.print(rows)
    return total < LARGE_SECONDS


def timed(call: Callable[[], Captured]) -> tuple[Captured, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def apply(passes: str, captured: Captured) -> list[PassRecord]:
    """The record of each pass, run without instruments."""
    context = Context(target=target("onnxruntime"), feeds=captured.feeds)
    parse(passes, REGISTRY).apply(captured.graph, context)
    return context.report.passes


def many_nodes(count: int) -> onnx.ModelProto:
    """Blocks of ten nodes in a row: work, and all that simplify takes away (casts, constants, doubles, dead ends)."""
    nodes: list[onnx.NodeProto] = []
    value = "x"

    def node(op: str, *inputs: str, **attributes: Any) -> str:
        output = f"v{len(nodes)}"
        nodes.append(helper.make_node(op, list(inputs), [output], name=f"n{len(nodes)}", **attributes))
        return output

    while len(nodes) < count:
        doubled = node("Add", node("Mul", value, "two"), node("Mul", value, "two"))
        known = node("Add", "two", "one")
        turned = node("Transpose", node("Transpose", doubled, perm=[1, 0]), perm=[1, 0])
        node("Relu", turned)
        value = node("Tanh", node("Div", node("Cast", turned, to=TensorProto.FLOAT), known))
    graph = helper.make_graph(
        nodes,
        "many",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, [4, 8])],
        [helper.make_tensor(name, TensorProto.FLOAT, [], [number]) for name, number in (("one", 1.0), ("two", 2.0))],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
