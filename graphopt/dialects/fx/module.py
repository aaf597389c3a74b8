"""An `FxGraph` as a torch.fx.GraphModule, to read, to call like the model, to train further and to export again.

A quantized weight becomes a float parameter and a `Rounded` module, which rounds it at each call to the integers that
it was stored in; activations are rounded in the same way. Dropout and batch norms are modules, as in the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphopt.dialects.fx.native import copied, has_effect, identifier, is_constant, meta, source
from graphopt.dialects.fx.spellings import arguments, quantized_decomposed
from graphopt.ir.graph import dtype_name
from graphopt.ir.qdq.integer_forms import unfold
from graphopt.ir.structure import Output

if TYPE_CHECKING:
    from graphopt.dialects.fx.graph import FxGraph

aten = torch.ops.aten
_LEARNED = ("weight", "bias", "table")
"""The operands of ops that become parameters."""
_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
"""The batch norm module by the rank of its input."""


class Rounded(nn.Module):
    """dequantize(quantize(x)), with a straight-through gradient (Bengio et al. 2013): that of the identity where x is
    within the range of the integers, and 0 elsewhere."""

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(
        self, scale: Tensor | None, zero_point: Tensor | None, low: int, high: int, dtype: torch.dtype,
        axis: int | None = None, block: int = 0,
    ) -> None:  # fmt: skip
        """scale: float32, one number, or one for each index along `axis` (and for each `block` entries along axis 1);
        None chooses scale and zero point from each x. low and high: the least and the largest integer."""
        super().__init__()
        if scale is not None and zero_point is None:
            zero_point = torch.zeros(scale.shape, dtype=dtype if axis is None else torch.int64)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.low, self.high, self.dtype, self.axis, self.block = low, high, dtype, axis, block

    def forward(self, x: Tensor) -> Tensor:
        scale, zero_point = self.scale, self.zero_point
        if scale is None or zero_point is None:
            scale, zero_point = torch.ops.graphopt.choose_qparams(x.detach())
        y = self._rounded(x.detach(), scale, zero_point)
        if torch.compiler.is_exporting() or not (torch.is_grad_enabled() and x.requires_grad):
            return y
        zero = zero_point.to(scale.dtype)
        low, high = (self._along((end - zero) * scale, x) for end in (self.low - 0.5, self.high + 0.5))
        within = x.clamp(low, high)
        return within + (y - within).detach()

    def _rounded(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        ops, limits, numbers = quantized_decomposed(), (self.low, self.high, self.dtype), (scale, zero_point)
        y: Tensor
        if self.block:  # torch quantizes groups only to integers of less than 8 bits
            steps = (x / self._along(scale, x)).round() + self._along(zero_point, x)
            steps = steps.clamp(self.low, self.high).to(self.dtype)
            y = ops.dequantize_per_channel_group(steps, *numbers, *limits, self.block, torch.float32)
        elif self.axis is None:
            y = ops.dequantize_per_tensor.tensor(
                ops.quantize_per_tensor.tensor(x, *numbers, *limits), *numbers, *limits
            )
        else:
            steps = ops.quantize_per_channel(x, *numbers, self.axis, *limits)
            y = ops.dequantize_per_channel(steps, *numbers, self.axis, *limits)
        return y

    def _along(self, parameter: Tensor, x: Tensor) -> Tensor:
        if self.block:
            return parameter.repeat_interleave(self.block, 1)
        return parameter if self.axis is None else parameter.reshape([-1, *[1] * (x.dim() - 1 - self.axis)])

    def extra_repr(self) -> str:
        return f"{dtype_name(self.dtype)} in [{self.low}, {self.high}]" + (
            "" if self.axis is None else f", axis={self.axis}"
        )


def as_module(graph: FxGraph, rebuild: Callable[[list[Any]], Any] | None = None) -> fx.GraphModule:
    """The graph as a module in eval mode, on copies of its tensors.

    Its forward takes the graph's inputs in order or by name (with an underscore for each character that Python does not
    allow), and returns what `rebuild` makes of the outputs; without it, a dict for any mapping that the model returned.
    Weights and biases in floats are parameters, named by the module path of the node that reads them.
    """
    graph = graph.clone()
    unfold(graph)
    return _Builder(graph).module(rebuild)


class _Builder:
    def __init__(self, graph: FxGraph) -> None:
        self.graph, self.program = graph, copied(graph.native.graph)
        self.attributes: dict[str, Any] = {}
        originals = dict(zip(self.program.nodes, graph.native.graph.nodes, strict=True))
        views = {node.native: node for node in graph.nodes}  # type: ignore[attr-defined]
        self.views = {copy: views[original] for copy, original in originals.items() if original in views}

    def module(self, rebuild: Callable[[list[Any]], Any] | None) -> fx.GraphModule:
        for node in list(self.program.nodes):
            self._round(node)
        for node in list(self.program.nodes):
            if "dropout" in node.meta and node.op == "call_function":
                self._restore_dropout(node)
            if node.target is aten.batch_norm.default and node in self.views and self.views[node].kind == "batch_norm":
                self._restore_batch_norm(node)
        for node in reversed(list(self.program.nodes)):
            if not node.users and node.op not in ("placeholder", "output") and not has_effect(node):
                self.program.erase_node(node)
        for node in list(self.program.find_nodes(op="get_attr")):
            self._store(node)
        self._name()
        for node in list(self.program.nodes):
            if node.target is aten.copy_.default:  # state is not differentiated
                with self.program.inserting_before(node):
                    node.update_arg(1, self.program.call_function(aten.detach.default, (node.args[1],)))
        self._return(rebuild)
        module = fx.GraphModule(self.attributes, self.program)
        module.eval()
        return module

    def _name(self) -> None:
        """Name nodes with weights by their module paths, and move each get_attr to its first use."""
        for node, view in self.views.items():
            if view.path and view.op is not None and not {"weight", "table"}.isdisjoint(view.op.operands):
                node._rename(identifier(view.path))
        order = {node: place for place, node in enumerate(self.program.nodes)}
        for node in list(self.program.find_nodes(op="get_attr")):
            min(node.users, key=order.__getitem__).prepend(node)

    # --- rounding

    def _round(self, node: fx.Node) -> None:
        """Replace a quantize and its dequantizes, or a dequantize of stored integers, by one `Rounded`."""
        if not str(node.target).startswith("quantized_decomposed.dequantize"):
            return
        given = arguments(node)
        x, path = given["input"], self._path(node)
        if is_constant(x):
            rounded = self._rounded(given)
            if rounded is None:
                return
            (user, *_), tensor = node.users, self._tensor(node)
            path = self._path(user)
            parameter = self._attribute(nn.Parameter(tensor), f"{path}.weight", node)
            self._replace(node, rounded, parameter, f"{path}.weight_rounded")
        elif str(x.target).startswith("quantized_decomposed.quantize_per"):
            quantize = arguments(x)
            names = ("scale", "zero_point") if "scale" in quantize else ("scales", "zero_points")
            if not all(self._same(quantize[name], given.get(name)) for name in names):
                return
            rounded = self._rounded(given)
            if rounded is not None:
                self._replace(node, rounded, quantize["input"], f"{path}.input_rounded")

    def _rounded(self, given: Mapping[str, Any]) -> Rounded | None:
        """The module for these arguments; None where anything but choose_qparams computes the scale."""
        scale, zero = (given[name] if name in given else given[f"{name}s"] for name in ("scale", "zero_point"))
        limits = given["quant_min"], given["quant_max"], given["dtype"]
        axis = given.get("axis", 1 if "group_size" in given else None)
        if isinstance(scale, fx.Node) and not is_constant(scale):
            chooser = source(scale) if scale.args else None
            chosen = chooser is not None and str(chooser.target) == "graphopt.choose_qparams.default"
            if not chosen or given["input"].args[0] is not source(chooser):  # type: ignore[arg-type]
                return None
            return Rounded(None, None, *limits)
        return Rounded(self._number(scale), self._number(zero), *limits, axis, given.get("group_size", 0))

    def _same(self, a: Any, b: Any) -> bool:
        """Whether two scales, or two zero points, are the same value or equal constants."""
        stored = all(isinstance(value, fx.Node) and is_constant(value) for value in (a, b))
        return a is b or a == b or (stored and torch.equal(self._constant(a), self._constant(b)))

    def _number(self, raw: Any) -> Tensor | None:
        if raw is None:
            return None
        return self._constant(raw).clone() if isinstance(raw, fx.Node) else torch.tensor(raw)

    def _replace(self, node: fx.Node, rounded: Rounded, x: fx.Node, name: str) -> None:
        known = [user for user in x.users if user.op == "call_module" and user.meta.get("rounds") is node.args[0]]
        if known:
            node.replace_all_uses_with(known[0])
        else:
            node.replace_all_uses_with(self._call(rounded, name, x, node, rounds=node.args[0]))
        self.program.erase_node(node)

    def _call(self, module: nn.Module, name: str, x: fx.Node, before: fx.Node, **marks: Any) -> fx.Node:
        name = self._free(name)
        self.attributes[name] = module
        with self.program.inserting_before(before):
            call = self.program.call_module(name, (x,))
        call.meta = before.meta | marks
        return call

    # --- what differs in training

    def _restore_dropout(self, node: fx.Node) -> None:
        """Put a Dropout module after a node that carries the mark of one."""
        rate, path = node.meta["dropout"]
        with self.program.inserting_after(node):
            call = self.program.call_module(self._free(path or "dropout"), (node,))
        self.attributes[str(call.target)] = nn.Dropout(rate)
        call.meta = {key: value for key, value in node.meta.items() if key != "dropout"}
        node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)

    def _restore_batch_norm(self, node: fx.Node) -> None:
        """Replace a batch norm with stored statistics by its module, which updates them in training."""
        given = arguments(node)
        stored = [given[name] for name in ("weight", "bias", "running_mean", "running_var")]
        if not all(map(is_constant, stored)):
            return
        weight, bias, mean, var = (self._constant(value).clone() for value in stored)
        norm = _NORMS[meta(node).dim()](len(weight), eps=given["eps"], momentum=given["momentum"] or 0.1)
        norm.weight, norm.bias = nn.Parameter(weight), nn.Parameter(bias)
        norm.running_mean, norm.running_var = mean, var
        node.replace_all_uses_with(self._call(norm, self._path(node) or "batch_norm", given["input"], node))
        self.program.erase_node(node)

    # --- tensors

    def _store(self, node: fx.Node) -> None:
        """Give a constant its attribute: a parameter where an op reads it as weight, bias or table."""
        thing = self.graph.native.stored.get(str(node.target))
        if "attribute" in node.meta:
            return
        if not isinstance(thing, Tensor):
            self.attributes[str(node.target)] = thing
            return
        name, learned = self._read_as(node)
        floating = thing.is_floating_point() and (learned or isinstance(thing, nn.Parameter))
        copy = thing.detach().clone()
        node.target = self._free(name or str(node.target))
        self.attributes[node.target] = nn.Parameter(copy) if floating else copy
        node._rename(identifier(node.target))

    def _read_as(self, node: fx.Node) -> tuple[str, bool]:
        """The name of a constant, by module path and operand of the node that reads it; whether it is a parameter."""
        readers = [user for constant in (node, *filter(is_constant, node.users)) for user in constant.users]
        for user in readers:
            view = self.views.get(user)
            if view is None or view.op is None or view.op.variadic:
                continue
            original = next((value for value in view.operands if value is not None and self._is(value, node)), None)
            if original is None:
                continue
            operand = view.op.operands[view.operands.index(original)]
            if operand in _LEARNED:
                return (f"{view.path}.{'weight' if operand == 'table' else operand}" if view.path else ""), True
        return "", False

    def _is(self, value: Any, node: fx.Node) -> bool:
        native = value.native
        while isinstance(native, fx.Node) and is_constant(native) and native.op != "get_attr":
            native = source(native)
        return isinstance(native, fx.Node) and native.op == "get_attr" and native.target == node.target

    def _attribute(self, thing: Any, name: str, before: fx.Node) -> fx.Node:
        name = self._free(name)
        self.attributes[name] = thing
        with self.program.inserting_before(before):
            node = self.program.create_node("get_attr", name)
        node.meta |= {"val": meta(before), "attribute": True}
        return node

    def _tensor(self, node: fx.Node) -> Tensor:
        """The floats that a dequantize computes from stored integers."""
        args, kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda item: self._constant(item) if isinstance(item, fx.Node) else item
        )
        tensor: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return tensor.contiguous()

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

    def _free(self, name: str) -> str:
        """The first of name, name_1, name_2 ... that is no attribute yet, nor the path of one."""
        name = name.lstrip(".")
        tried = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
        return next(free for free in tried if not any(f"{used}.".startswith(f"{free}.") for used in self.attributes))

    # --- results

    def _return(self, rebuild: Callable[[list[Any]], Any] | None) -> None:
        """Return what the model returned. A mapping that is no dict is made by a call of its type."""
        output = next(iter(reversed(self.program.nodes)))
        results = list(output.args[0])
        if rebuild is None:
            returned = pytree.tree_map(
                lambda leaf: results[leaf.index] if isinstance(leaf, Output) else leaf, self.graph.returns
            )
        else:
            with self.program.inserting_before(output):
                returned = self._written(rebuild(results))
        output.args = (returned,)

    def _written(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            items = {str(key): self._written(item) for key, item in value.items()}
            return items if type(value) is dict else self.program.call_function(type(value), (), items)
        if isinstance(value, list | tuple):
            several = [self._written(item) for item in value]
            return several if isinstance(value, list) else tuple(several)
        return value
