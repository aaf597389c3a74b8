"""A graph of ops -> a function of TensorFlow with named inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.backends.tensorflow import canonical, operators
from graphopt.backends.tensorflow.call import Call, ChannelsLast, Form, Stored, Values, to_last
from graphopt.errors import GraphoptError, LoweringError, few, first_line
from graphopt.ir.graph import Graph, Node, Value, dtype_name, unique_labels

FORMS: Mapping[str, Form] = canonical.FORMS | operators.FORMS
"""How TensorFlow computes each kind of node."""


def require_forms(graph: Graph) -> None:
    """Raise LoweringError, naming all of them, where nodes, inputs or outputs have no form in TensorFlow."""
    nodes = [node for node in graph.nodes if node.kind not in FORMS]
    labels, by_kind = unique_labels(nodes), dict[str, list[str]]()
    for node in nodes:
        by_kind.setdefault(node.kind, []).append(labels[node])
    if by_kind:
        listed = "; ".join(f"{kind} ({few(named)})" for kind, named in by_kind.items())
        raise LoweringError(
            f"tensorflow has no form of these operators: {listed}. Use target=onnxruntime, or a model without them"
        )
    strange = [value.name for value in (*graph.inputs, *graph.outputs) if value.dtype is None]
    if strange:
        raise LoweringError(f"{', '.join(strange)}: tensorflow has no values of this type (a sequence, a map, or text)")


@dataclass(frozen=True)
class Function:
    """A traced function of TensorFlow, with the variables that it reads."""

    module: Any
    """A tf.Module, which holds the variables."""
    concrete: Any
    """Takes the inputs in order, and returns a dict of the outputs by name."""


def function(tf: Any, graph: Graph) -> Function:
    """The function that computes a graph. Dynamic axes stay dynamic. Raises LoweringError naming the node."""
    require_forms(graph)
    stored = Stored(tf, graph)

    def compute(*inputs: Any) -> dict[str, Any]:
        values = Values(stored)
        for value, tensor in zip(graph.inputs, inputs, strict=True):
            values.set(value, tensor)
        for node in graph.nodes:
            _translate(tf, node, values)
        return {value.name: tf.identity(values.plain(value)) for value in graph.outputs}

    traced = tf.function(compute, autograph=False, input_signature=[_spec(tf, value) for value in graph.inputs])
    concrete = traced.get_concrete_function()
    module = tf.Module()
    module.stored = stored.variables
    return Function(module, concrete)


def _spec(tf: Any, value: Value) -> Any:
    shape = None if value.shape is None else [size if isinstance(size, int) else None for size in value.shape]
    return tf.TensorSpec(shape, tf.as_dtype(dtype_name(value.dtype)))


def _translate(tf: Any, node: Node, values: Values) -> None:
    form = FORMS[node.kind]
    read = [value for value in node.operands if value is not None]
    in_any_layout = form.elementwise and node.result.rank is not None
    by_channels_last = in_any_layout and any(values.is_channels_last(value) for value in read)
    try:
        found = form.apply(tf, Call(node, values, by_channels_last))
        several = found if isinstance(found, tuple) else (found,)
        for result, one in zip(node.results, several, strict=False):
            layout = ChannelsLast(one) if by_channels_last else one
            _set_sizes(result, layout)
            values.set(result, layout)
    except GraphoptError:
        raise
    except Exception as error:
        ranks = {value.name: values.plain(value).shape.rank for value in read}
        unknown = next((name for name, rank in ranks.items() if rank is None), None)
        why = first_line(error) if unknown is None else f"the rank of {unknown} is not known before it runs"
        raise LoweringError(f"tensorflow has no form of {node.kind} here: {why} ({node.label})") from error


def _set_sizes(value: Value, found: Any) -> None:
    """Tell TensorFlow the sizes that the graph knows: it loses some where shapes are computed."""
    if value.shape is None:
        return
    sizes = [size if isinstance(size, int) else None for size in value.shape]
    if isinstance(found, ChannelsLast):
        found.tensor.set_shape([sizes[axis] for axis in to_last(len(sizes))])
    else:
        found.set_shape(sizes)
