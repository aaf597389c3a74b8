"""A model that fails -> a smaller one that still fails, and its text, from which a test is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tests.fuzz.onnx_graphs import Array, read_by, runs, session

Fails = Callable[[onnx.ModelProto, Mapping[str, Array]], bool]


def reduced(
    model: onnx.ModelProto, feeds: Mapping[str, Array], fails: Fails
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Cut what stands before and behind the fault: values become inputs, and others become the only outputs.

    The engine runs every model that `fails` is asked about.
    """
    smaller, given = model, dict(feeds)
    going = True
    while going:
        going = False
        for tried, fed in _cuts(smaller, given):
            if len(tried.graph.node) < len(smaller.graph.node) and runs(tried, fed) is not None and fails(tried, fed):
                smaller, given, going = tried, fed, True
                break
    return smaller, given


def _cuts(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[tuple[onnx.ModelProto, dict[str, Array]]]:
    flow = _flow(model, feeds)
    found = []
    made = [name for node in model.graph.node for name in node.output if name in flow]
    for name in made:  # behind it
        found.append(_pruned(model, feeds, [name], {}))
    outputs = [output.name for output in model.graph.output]
    for name in reversed(made):  # before it
        found.append(_pruned(model, feeds, outputs, {name: flow[name]}))
    return found


def _flow(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What each node makes, as far as it is a tensor."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    del whole.graph.output[:]
    names = [name for node in model.graph.node for name in node.output if name]
    whole.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    found = session(whole).run(names, dict(feeds))
    return {name: array for name, array in zip(names, found, strict=True) if isinstance(array, np.ndarray)}


def _pruned(
    model: onnx.ModelProto, feeds: Mapping[str, Array], outputs: list[str], given: Mapping[str, Array]
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The model of these outputs, with `given` as inputs; the first axis of what `n` was stays open."""
    needed, kept = set(outputs), []
    for node in reversed(model.graph.node):
        if any(name in needed and name not in given for name in node.output):
            kept.append(node)
            needed |= read_by(node)
    smaller = onnx.ModelProto()
    smaller.CopyFrom(model)
    graph = smaller.graph
    del graph.node[:], graph.output[:], graph.input[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(one for one in model.graph.initializer if one.name in needed)
    graph.input.extend(one for one in model.graph.input if one.name in needed)
    for name, array in given.items():
        if name in needed:
            sizes = ["n", *array.shape[1:]] if array.ndim else []
            graph.input.append(
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), sizes)
            )
    types = {one.name: one for one in model.graph.output}
    graph.output.extend(types.get(name, helper.make_empty_tensor_value_info(name)) for name in outputs)
    fed = {one.name: {**feeds, **given}[one.name] for one in graph.input if one.name in {**feeds, **given}}
    for output in graph.output:
        if not output.type.tensor_type.elem_type:
            made = _flow(smaller, fed).get(output.name) if graph.node else None
            if made is not None:
                dtype = helper.np_dtype_to_tensor_dtype(made.dtype)
                output.CopyFrom(helper.make_tensor_value_info(output.name, dtype, None))
    return smaller, fed


def text_of(model: onnx.ModelProto) -> str:
    """The graph in ONNX's text form, and what it stores, so far as that is small."""
    stored = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.initializer[:]
    numbers = [f"{name} = {array.dtype}{list(array.shape)} {np.array2string(array, threshold=12, precision=3)}"
               for name, array in stored.items()]  # fmt: skip
    return "\n".join([onnx.printer.to_text(bare), *numbers])
