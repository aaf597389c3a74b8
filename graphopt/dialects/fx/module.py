"""An `FxGraph` as a torch.fx.GraphModule, to read, to call like the model, to train further and to export again.

A quantized weight becomes a float parameter and a `Rounded` module, which rounds it at each call to the integers that
it was stored in; activations are rounded in the same way. Dropout and batch norms are modules, as in the model.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphopt.dialects.fx import pairs
from graphopt.dialects.fx.absorb import ORIGINS, Origins, RoundedWeight
from graphopt.dialects.fx.native import copied, has_effect, identifier, is_constant, meta, source
from graphopt.dialects.fx.pairs import Pair, Scale, inverse, layout, scale_of
from graphopt.dialects.fx.rounded import Rounded
from graphopt.dialects.fx.spellings import arguments
from graphopt.dialects.fx.views import raw_of
from graphopt.dialects.fx.writer import NodeWriter
from graphopt.errors import GraphError
from graphopt.ir.graph import Value
from graphopt.ir.qdq.integer_forms import unfold
from graphopt.ir.structure import Output

if TYPE_CHECKING:
    from graphopt.dialects.fx.graph import FxGraph

aten = torch.ops.aten
_LEARNED = ("weight", "recurrent", "bias", "peepholes", "table")
"""The operands of ops that become parameters."""
_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
"""The batch norm module by the rank of its input."""

_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
"""What a batch norm holds, as its module and its aten operator call it."""


class TrainableModule(fx.GraphModule):
    """A GraphModule whose tensors that are created at each call (arange, full, ...) follow it to another device."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainableModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        own = next(itertools.chain(self.parameters(), self.buffers()), None)
        device = fn(torch.empty(0)).device if own is None else own.device
        for module in self.modules():
            if isinstance(module, fx.GraphModule):
                create_on(module, device)
        return self


def create_on(module: fx.GraphModule, device: torch.device) -> None:
    """Rewrite the arguments of a GraphModule that name a device."""

    def moved(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    changed = False
    for node in module.graph.nodes:
        given = fx.node.map_aggregate((node.args, node.kwargs), moved)
        if given != (node.args, node.kwargs):
            (node.args, node.kwargs), changed = given, True
    if changed:
        module.recompile()


def as_module(
    graph: FxGraph,
    rebuild: Callable[[list[Any]], Any] | None = None,
    *,
    also: Sequence[Value] = (),
    learn_scales: bool = False,
) -> TrainableModule:
    """The graph as a module in eval mode, on copies of its tensors.

    Its forward takes the graph's inputs in order or by name (with an underscore for each character that Python does not
    allow), and returns what `rebuild` makes of the outputs; without it, a dict for any mapping that the model returned.
    With `also`, it returns that and a list of these values. Weights and biases in floats are parameters, named by the
    module path of the node that reads them; so are, with learn_scales, the scales that nothing but quantize and
    dequantize reads. A constant is one parameter, whoever reads it.
    """
    clone = graph.clone()
    if also:
        _return_also(graph, clone, also)
    unfold(clone)
    return _Builder(clone, learn_scales).module(rebuild, len(also))


def _return_also(graph: FxGraph, clone: FxGraph, also: Sequence[Value]) -> None:
    """Add to the outputs of a clone the values that it has for those of the graph."""
    counterparts = dict(zip(graph.native.graph.nodes, clone.native.graph.nodes, strict=True))
    found, writer = [], NodeWriter(clone.native)
    for value in also:
        raw = raw_of(value)
        if isinstance(raw, fx.Node) and raw not in counterparts:
            raise GraphError(f"{value.name} is no value of this graph: ask for values that its nodes have now")
        found.append(counterparts[raw] if isinstance(raw, fx.Node) else writer.tensor(raw))
    clone.output_names += [f"also {place}" for place in range(len(found))]
    clone.native.output.args = ((*clone.native.output.args[0], *found),)  # type: ignore[misc]


def _symmetric(integers: Tensor, limits: tuple[float, float]) -> tuple[float, float]:
    """The range that a weight without zero points was rounded to, within the limits that its dequantize names.

    That is ±high, unless the integers have the lowest one. Where 8 bits hold ±63 alone, the weight was rounded to 7,
    for products that must not saturate; nothing else says so.
    """
    low, high = limits
    least, most = (int(end) for end in integers.aminmax())
    if least == low:
        return limits
    return (-63, 63) if high == 127 and -least <= 63 and most <= 63 else (-high, high)


class _Builder:
    """Turns a copy of a graph's program into that of its module, and collects the attributes that it reads."""

    def __init__(self, graph: FxGraph, learn_scales: bool) -> None:
        self.graph, self.program, self.learn_scales = graph, copied(graph.native.graph), learn_scales
        self.attributes: dict[str, Any] = {}
        self.taken: set[str] = set()
        """The names of attributes, and of all that holds one."""
        self.origins = Origins({}, {}, {}, {})
        self.places: dict[str, str] = {}
        """The attribute that stands for a constant of the graph, by name in the graph."""
        self.learned: dict[Scale, nn.Parameter] = {}
        """The parameter of each learned scale; those of one pair, or of pairs that share a scale, have the same."""
        self.calls: dict[Any, fx.Node] = {}
        """The calls of modules, by what they replace: a quantize, the name of stored integers, that and their
        permutation, or the names of the constants of a batch norm."""
        self.originals = dict(zip(self.program.nodes, graph.native.graph.nodes, strict=True))
        views = {node.native: node for node in graph.nodes}  # type: ignore[attr-defined]
        self.views = {node: views[original] for node, original in self.originals.items() if original in views}

    def module(self, rebuild: Callable[[list[Any]], Any] | None, also: int) -> TrainableModule:
        self._prune()
        self._round()
        for node in list(self.program.nodes):
            if "dropout" in node.meta and node.op == "call_function":
                self._restore_dropout(node)
            if node.target is aten.batch_norm.default and node in self.views and self.views[node].kind == "batch_norm":
                self._restore_batch_norm(node)
        self._prune()
        for node in list(self.program.find_nodes(op="get_attr")):
            self._store(node)
        self._name()
        for node in list(self.program.nodes):
            if node.target is aten.copy_.default:  # state is not differentiated
                with self.program.inserting_before(node):
                    node.update_arg(1, self.program.call_function(aten.detach.default, (node.args[1],)))
        self._return(rebuild, also)
        module = TrainableModule(self.attributes, self.program)
        module.meta[ORIGINS] = self.origins
        module.eval()
        return module

    def _prune(self) -> None:
        for node in reversed(list(self.program.nodes)):
            if not node.users and node.op not in ("placeholder", "output") and not has_effect(node):
                self.program.erase_node(node)

    def _name(self) -> None:
        """Name nodes with weights by their module paths, and move each get_attr to its first use."""
        for node, view in self.views.items():
            if view.path and view.op is not None and not {"weight", "table"}.isdisjoint(view.op.operands):
                node._rename(identifier(view.path))
        order = {node: place for place, node in enumerate(self.program.nodes)}
        for node in list(self.program.find_nodes(op="get_attr")):
            min(node.users, key=order.__getitem__).prepend(node)

    # --- rounding

    def _round(self) -> None:
        """Replace each quantize and its dequantizes, and the dequantizes of stored integers, by a `Rounded`."""
        weights, activations = pairs.find(self.program.nodes, self._constant)
        if self.learn_scales:
            self._learn([*weights.values(), *([pair] for pair in activations)])
        for name, same in weights.items():
            self._round_weight(name, same)
        for pair in activations:
            self._round_activation(pair)
        for quantize in dict.fromkeys(pair.quantize for pair in activations):
            assert quantize is not None
            if quantize.users:  # by others than dequantizes
                quantize.replace_all_uses_with(self._integers(self.calls[quantize], quantize))

    def _learn(self, groups: Sequence[Sequence[Pair]]) -> None:
        """Make one parameter of the scales of each group, and of groups that share one, if nothing else reads them."""
        groups = [group for group in groups if all(pair.learns for pair in group)]
        numbers = [[number for pair in group for number in pair.numbers()] for group in groups]
        replaced = {node for group in numbers for node, _ in group}
        readers: dict[Scale, set[fx.Node]] = {}
        for node in self.program.find_nodes(op="get_attr"):
            readers.setdefault(str(node.target), set()).update(node.users)
        together: dict[Scale, set[Scale]] = {}
        first: dict[Scale, Tensor] = {}
        for group in numbers:
            first |= {scale_of(node, scale): self._number(scale) for node, scale in group}
            merged = {scale_of(node, scale) for node, scale in group}
            merged.update(*(together.get(scale, ()) for scale in merged))
            together |= dict.fromkeys(merged, merged)
        for scales in {id(scales): scales for scales in together.values()}.values():
            start = first[next(iter(scales))]
            alone = all(readers.get(scale, set()) <= replaced for scale in scales)
            if alone and start.dtype == torch.float32 and bool((start != 0).all()):
                self.learned |= dict.fromkeys(scales, nn.Parameter(start))

    def _round_weight(self, name: str, same: Sequence[Pair]) -> None:
        """Make one float parameter of stored integers, in their layout, which each dequantize rounds."""
        path, operand = self._read_as(same[0].dequantize)
        own = f"{path}.{operand or 'weight'}"
        parameter = self._attribute(nn.Parameter(pairs.floats(same[0], self._constant)), own)
        for pair in same:
            _, permutation = layout(pair.form.x)
            key = name, permutation
            if key not in self.calls:
                rounded = self._rounded(pair)
                x = self._permuted(parameter, permutation, pair.dequantize)
                self.calls[key] = self._call(rounded, f"{own}_rounded", x, pair.dequantize)
                self.calls.setdefault(name, self.calls[key])
                made = RoundedWeight(str(parameter.target), str(self.calls[key].target), permutation)
                self.origins.weights.setdefault(name, made)
            self._replace(pair, self.calls[key])

    def _round_activation(self, pair: Pair) -> None:
        assert pair.quantize is not None and pair.rounds is not None
        if pair.quantize not in self.calls:
            name = f"{self._path(pair.dequantize)}.input_rounded"
            x = source(pair.quantize)  # as it is now: what it read may be rounded itself
            call = self._call(self._rounded(pair), name, x, pair.dequantize)
            pair.quantize.prepend(call)  # where what reads the integers may read them of it
            self.calls[pair.quantize] = call
        self._replace(pair, self.calls[pair.quantize])

    def _rounded(self, pair: Pair) -> Rounded:
        """The module in place of a pair."""
        form, rounds = pair.form, pair.rounds or pair.form
        limits, declared = (rounds.low, rounds.high), (form.low, form.high)
        if pair.dynamic:
            return Rounded(None, None, *limits, form.dtype, rows=pair.rows, declared=declared)
        weight = pair.quantize is None
        zero_point = None if form.zero_point is None else self._number(form.zero_point)
        if weight and form.dtype == torch.int8 and not form.block and (zero_point is None or not zero_point.any()):
            limits = _symmetric(self._constant(form.x), limits)
        step = self.learned.get(scale_of(pair.dequantize, form.scale), self._number(form.scale))
        numbers = step, zero_point, *limits, form.dtype, form.axis, form.block
        return Rounded(*numbers, weight=weight, declared=declared)

    def _replace(self, pair: Pair, call: fx.Node) -> None:
        """Use a call of a `Rounded` in place of a pair's dequantize, and note which scales it learns."""
        for node, scale in pair.numbers():
            if scale_of(node, scale) in self.learned:
                if isinstance(scale, fx.Node):
                    self.origins.scales.setdefault(layout(scale)[0], str(call.target))
                else:
                    self.origins.numbers[node.name] = str(call.target)
        pair.dequantize.replace_all_uses_with(call)
        self.program.erase_node(pair.dequantize)

    def _integers(self, call: fx.Node, before: fx.Node) -> fx.Node:
        """The integers that a `Rounded` rounds to, for what reads integers and not what they stand for."""
        with self.program.inserting_before(before):
            rounded = self.program.create_node("get_attr", str(call.target))
            rounded.meta["attribute"] = True
            integers = self.program.call_method("integers", (rounded, call.args[0]))
        integers.meta = dict(before.meta)
        return integers

    def _number(self, raw: fx.Node | float) -> Tensor:
        return self._constant(raw).clone() if isinstance(raw, fx.Node) else torch.tensor(raw)

    def _permuted(self, node: fx.Node, permutation: Sequence[int], before: fx.Node) -> fx.Node:
        if list(permutation) == sorted(permutation):
            return node
        with self.program.inserting_before(before):
            return self.program.call_function(aten.permute.default, (node, list(permutation)))

    def _call(self, module: nn.Module, name: str, x: fx.Node, like: fx.Node) -> fx.Node:
        """A call of a module just before a node, with its shape, dtype and path."""
        name = self._add(name, module)
        with self.program.inserting_before(like):
            call = self.program.call_module(name, (x,))
        call.meta = dict(like.meta)
        return call

    # --- what differs in training

    def _restore_dropout(self, node: fx.Node) -> None:
        """Put a Dropout module after a node that carries the mark of one."""
        rate, path = node.meta["dropout"]
        with self.program.inserting_after(node):
            call = self.program.call_module(self._add(path or "dropout", nn.Dropout(rate)), (node,))
        call.meta = {key: value for key, value in node.meta.items() if key != "dropout"}
        node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)

    def _restore_batch_norm(self, node: fx.Node) -> None:
        """Replace a batch norm with stored statistics by its module, which updates them in training."""
        given = arguments(node)
        stored = [given[name] for name in _NORM_TENSORS]
        if not all(map(is_constant, stored)):
            return
        names = [layout(value)[0] for value in stored]
        key = *names, given["eps"], given["momentum"]
        if key in self.calls:  # a module that is called twice
            with self.program.inserting_before(node):
                call = self.program.call_module(str(self.calls[key].target), (given["input"],))
            call.meta = dict(node.meta)
        else:
            weight, bias, mean, var = (self._constant(value).clone() for value in stored)
            norm = _NORMS[meta(node).dim()](len(weight), eps=given["eps"], momentum=given["momentum"] or 0.1)
            norm.weight, norm.bias = self._parameter(names[0], weight), self._parameter(names[1], bias)
            norm.running_mean, norm.running_var = mean, var
            call = self.calls[key] = self._call(norm, self._path(node) or "batch_norm", given["input"], node)
            for name, own in zip(names, _NORM_TENSORS, strict=True):
                place = self.places.setdefault(name, f"{call.target}.{own}")
                self.attributes.setdefault(place, getattr(norm, own))
                self.origins.floats[name] = place
        node.replace_all_uses_with(call)
        self.program.erase_node(node)

    def _parameter(self, name: str, tensor: Tensor) -> nn.Parameter:
        """The parameter that stands for a constant, another one's if there is one."""
        known = self.attributes.get(self.places.get(name, ""))
        return known if isinstance(known, nn.Parameter) else nn.Parameter(tensor)

    # --- tensors

    def _store(self, node: fx.Node) -> None:
        """Give a constant its attribute: a parameter where an op reads it as weight, bias or table."""
        if "attribute" in node.meta:
            return
        name = str(node.target)
        if name in self.origins.weights:
            self._store_integers(node)
            return
        if name not in self.places:
            thing = self.graph.native.stored.get(name)
            path, operand = self._read_as(node) if isinstance(thing, Tensor) else ("", None)
            if not isinstance(thing, Tensor):
                attribute: Any = copy.deepcopy(thing)
            elif thing.is_floating_point() and (operand or isinstance(thing, nn.Parameter)):
                attribute = nn.Parameter(thing.detach().clone())
            else:
                attribute = thing.detach().clone()
            self.places[name] = self._add(f"{path}.{operand}" if path and operand else name, attribute)
            if isinstance(attribute, nn.Parameter):
                self.origins.floats[name] = self.places[name]
        node.target = self.places[name]
        node._rename(identifier(node.target))

    def _store_integers(self, node: fx.Node) -> None:
        """Let what reads the stored integers of a rounded weight read what it is rounded to."""
        name = str(node.target)
        integers = self._integers(self.calls[name], node)
        stored = self._permuted(integers, inverse(self.origins.weights[name].permutation), node)
        node.replace_all_uses_with(stored)
        self.program.erase_node(node)

    def _read_as(self, node: fx.Node) -> tuple[str, str | None]:
        """Of a constant, or of the dequantize of one: the module path of a node that reads it (one that reads it as a
        weight, bias or table, if there is one), and which of these it is: weight (of a table too), bias or None."""
        waiting, path = [node], ""
        for constant in waiting:
            waiting += filter(is_constant, constant.users)
            for view in filter(None, map(self.views.get, constant.users)):
                path = path or view.path
                if view.op is None or view.op.variadic:
                    continue
                found = next((value for value in view.operands if value is not None and self._reads(value, node)), None)
                operand = None if found is None else view.op.operands[view.operands.index(found)]
                if operand in _LEARNED:
                    return view.path, "weight" if operand == "table" else operand
        return path, None

    def _reads(self, value: Value, node: fx.Node) -> bool:
        """Whether a value of the graph is what a node of its module computes, or a permute of its constant."""
        native = raw_of(value)
        if not isinstance(native, fx.Node) or not is_constant(native):
            return native is self.originals.get(node)
        return node.op == "get_attr" and layout(native)[0] == node.target

    def _attribute(self, thing: nn.Parameter, name: str) -> fx.Node:
        """A parameter that any node may read."""
        name = self._add(name, thing)
        with self.program.inserting_before(next(iter(self.program.nodes))):
            node = self.program.create_node("get_attr", name)
        node.meta["attribute"] = True
        return node

    def _constant(self, node: fx.Node) -> Tensor:
        if node.op == "get_attr":
            tensor: Tensor = self.graph.native.stored[str(node.target)]
            return tensor.detach()
        if node.target is aten._to_copy.default:  # the cast of a zero point to int64
            return self._constant(source(node)).to(torch.int64)
        return self._constant(source(node)).permute(node.args[1])  # type: ignore[arg-type]

    def _path(self, node: fx.Node) -> str:
        view = self.views.get(node)
        return "" if view is None else view.path

    def _add(self, name: str, thing: Any) -> str:
        """Add an attribute under the first of name, name_1, name_2 ... that is none yet, nor holds one."""
        name = name.lstrip(".")
        tried = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
        name = next(free for free in tried if free not in self.taken)
        parts = name.split(".")
        self.taken.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
        self.attributes[name] = thing
        return name

    # --- results

    def _return(self, rebuild: Callable[[list[Any]], Any] | None, also: int) -> None:
        """Return what the model returned, and the last `also` outputs beside it. A mapping that is no dict is made by a
        call of its type."""
        output = next(iter(reversed(self.program.nodes)))
        values = list(output.args[0])
        results, further = values[: len(values) - also], values[len(values) - also :]
        if rebuild is None:
            returned = pytree.tree_map(
                lambda leaf: results[leaf.index] if isinstance(leaf, Output) else leaf, self.graph.returns
            )
        else:
            with self.program.inserting_before(output):
                returned = self._written(rebuild(results))
        output.args = ((returned, further),) if also else (returned,)

    def _written(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            items = {str(key): self._written(item) for key, item in value.items()}
            return items if type(value) is dict else self.program.call_function(type(value), (), items)
        if isinstance(value, list | tuple):
            several = [self._written(item) for item in value]
            return several if isinstance(value, list) else tuple(several)
        return value
