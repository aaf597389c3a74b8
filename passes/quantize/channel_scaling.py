"""Scale channels of activations: the node that computes a value, and the weights that read it, absorb the factors at no
cost; where no node can, a product with the factors may stand in front of the linears that read the value."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.analysis import propagation
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.qdq.regions import JOINED, MOVES, is_dequantized, label_of
from graphopt.ir.scaled import Scaled
from graphopt.numerics.observe import ChannelMinMax
from graphopt.numerics.smooth import ALPHAS, expected_error, outlier_factors, smooth_factors
from graphopt.passes.quantize.schemes import not_float32
from graphopt.pipeline.context import Context
from graphopt.pipeline.inputs import covariances
from graphopt.pipeline.weights import Weight, why_fixed

_HOMOGENEOUS = {"linear": ("relu", "leaky_relu"), "conv": ("relu", "leaky_relu", "max_pool", "average_pool")}
"""Ops with f(a x) = a f(x) for a > 0 in each channel, by the op that reads their result. Pools work along the last
axis, which holds the channels of a linear."""


WORTH = 4.0
"""How many times lower the expected error must be for a product of its own, which is a pass over the value: in MiniLM,
where 12 of 25 values that linears read gain so much, these take 1 to 2 percent of the time."""

_OUTLIERS = (1, 2, 4, 8)
"""Numbers of channels that a product of its own may scale, while it leaves the others."""


@dataclass(frozen=True)
class Scalable:
    """A value whose channels can be scaled, the linears or convs that read it, and the node that makes it."""

    value: Value
    readers: Sequence[Node]
    scaled: Sequence[Node]
    """The nodes whose results are scaled, first to last: one that makes them, and those that pass them on. Empty where
    a product scales the value in front of these readers, and others read it as it is."""
    channels: int

    @property
    def maker(self) -> Node | None:
        """A norm, linear or conv: its weight has one row, or one entry, per channel."""
        return self.scaled[0] if self.scaled else None

    @property
    def axis(self) -> int:
        return 1 if self.readers[0].kind == "conv" else -1

    @property
    def depthwise(self) -> bool:
        return any(site.kind == "conv" and site.attributes["groups"] > 1 for site in self.readers)

    def candidates(self, low: Tensor, high: Tensor) -> dict[float | str | None, Tensor]:
        """Factors (channels,) by alpha of SmoothQuant, how much of the range moves into the weights, or by how many
        channels they scale; None: all 1.

        low, high: (channels,), the ranges. The weights of a depthwise conv have one scale per channel and lose nothing
        by any factors: alpha is 1.
        """
        activations = torch.maximum(low.abs(), high.abs())
        if self.depthwise:
            sizes = torch.where(activations > 0, activations, 1.0)
            return {1.0: sizes / sizes.log().mean().exp()}
        weights = [site.weight for site in self.readers]
        largest = torch.stack([one.abs().transpose(0, 1).flatten(1).amax(1) for one in weights if one is not None])
        found: dict[float | str | None, Tensor] = {None: torch.ones(self.channels)}
        if not self.scaled:
            counts = [count for count in _OUTLIERS if count < self.channels]
            found |= {f"of {count} channels": outlier_factors(activations, count) for count in counts}
        return found | {alpha: smooth_factors(activations, largest.amax(0), alpha) for alpha in ALPHAS}


def smooth_channels(
    graph: Graph, context: Context, sites: Sequence[Node], *, adds: bool = False
) -> tuple[dict[Node, Node], dict[Node, Decline]]:
    """Divide the channels that linears and convs read by factors that lower the error, and multiply their weights.

    adds: whether a product with the factors may be added, where that lowers the error WORTH times and nothing absorbs
    them. Returns the new node by each node that was replaced (sites, and the makers of the values that they read), and
    why each of the other sites is unchanged. The alpha of each value is noted. Raises UsageError without calibration.
    """
    groups: dict[Value, tuple[Scalable, list[Node]]] = {}
    declined: dict[Node, Decline] = {}
    chosen_from = set(sites)
    for site in sites:
        found = scalable(site) if site.kind in ("linear", "conv") else Decline("no_weight_to_scale", op=site.kind)
        if isinstance(found, Decline) and adds:
            found = _multipliable(site, chosen_from, context) or found
        if isinstance(found, Scalable):
            groups.setdefault(found.value, (found, []))[1].append(site)
        else:
            declined[site] = found
    chosen = []
    for value, factors in _factors(graph, context, {value: one for value, (one, _) in groups.items()}).items():
        one, readers = groups[value]
        if factors is None:
            declined |= dict.fromkeys(readers, Decline("smoothing_no_gain"))
        else:
            chosen.append((one, factors))
    return rescale(graph, chosen), declined


def _factors(graph: Graph, context: Context, groups: Mapping[Value, Scalable]) -> dict[Value, Tensor | None]:
    """The factors of each value with the least expected error, None where no smoothing is best."""
    wanted = [(value, ChannelMinMax(one.channels, one.axis)) for value, one in groups.items()]
    ranges = dict(zip(groups, context.statistics(graph, wanted), strict=True)) if groups else {}
    candidates = {value: one.candidates(ranges[value].low, ranges[value].high) for value, one in groups.items()
                  if ranges[value].count}  # fmt: skip
    weights, owners = [], dict[Value, Value]()
    for value in candidates:
        for site in groups[value].readers if not groups[value].depthwise else ():
            weight = site.required("weight")
            weights.append(Weight(weight, [site]))
            owners[weight] = value
    errors: dict[Value, dict[float | str | None, float]] = {
        value: dict.fromkeys(found, 0.0) for value, found in candidates.items()
    }
    for one, covariance in covariances(graph, context, weights) if weights else ():
        value = owners[one.value]
        for alpha, factors in candidates[value].items():
            ends = ranges[value].low, ranges[value].high
            errors[value][alpha] += error_of(one.tensor, covariance[0], *ends, factors)
    best = {value: min(found, key=lambda alpha: found[alpha]) for value, found in errors.items()}
    for value, alpha in best.items():
        if not groups[value].scaled and errors[value][alpha] * WORTH > errors[value][None]:
            best[value] = None
    for what, adds in ((_ABSORBED, False), (_ADDED, True)):
        notes = [f"{label_of(value)} {alpha}" for value, alpha in best.items()
                 if alpha is not None and adds != bool(groups[value].scaled)]  # fmt: skip
        if notes:
            context.note(f"{what}, by activation: {', '.join(notes)}")
    return {value: candidates[value][best[value]] if best.get(value) is not None else None for value in groups}


_ABSORBED = "alpha of SmoothQuant (how much of the range moves into the weights)"
_ADDED = "channels scaled by a product of their own, as other ops read them too or nothing absorbs the factors (alpha)"


def error_of(weight: Tensor, covariance: Tensor, low: Tensor, high: Tensor, factors: Tensor) -> float:
    """`expected_error` of a linear or conv (out, channels, ...) whose channels are divided by factors."""
    flat = weight.flatten(1)
    sides = [side.repeat_interleave(flat.shape[1] // len(side)) for side in (low, high, factors)]
    return expected_error([flat], covariance, *sides)


def rescale(graph: Graph, chosen: Iterable[tuple[Scalable, Tensor]]) -> dict[Node, Node]:
    """Divide the result of each maker by factors (channels,), and multiply the weights that read it.

    Records what is divided (`Graph.scaled`). Returns the new node in place of each old one.
    """
    rows, columns, replaced = dict[Node, Tensor](), dict[Node, Tensor](), dict[Node, Node]()
    places, scaled = propagation.places(graph), dict(graph.scaled)
    added, products = dict[Node, Tensor](), dict[Value, Value]()
    for one, factors in chosen:
        for place in [places[node] for node in one.scaled if node in places]:
            now = Scaled(factors.float(), one.axis)
            scaled[place] = scaled[place].then(now) if place in scaled else now
        columns |= dict.fromkeys(one.readers, factors)
        if one.maker is not None:
            rows[one.maker] = factors
        else:
            added |= dict.fromkeys(one.readers, factors)
    graph.scaled = scaled
    for node in [node for node in graph.nodes if node in rows or node in columns]:
        weight, bias = node.weight, node.operand("bias") if node.kind != "rms_norm" else None
        assert weight is not None
        if node in columns:  # in a depthwise conv, axis 0 holds the channels that it reads
            axis = 0 if node.kind == "conv" and node.attributes["groups"] > 1 else 1
            weight = weight * _along(columns[node], axis, weight)
        if node in rows:
            weight = weight / _along(rows[node], 0, weight)
            held = graph.constant(bias) if bias is not None else None
            bias = None if bias is None or held is None else graph.add_constant(held / rows[node], bias.name)
        x = node.input
        if node in added:
            if x not in products:
                products[x] = graph.emit("mul", x, graph.add_constant(1 / added[node], "scales"), at=node)
            x = products[x]
        stored = graph.add_constant(weight, node.required("weight").name)
        operands = (x, stored) if node.kind == "rms_norm" else (x, stored, bias)
        result = graph.emit(node, *operands, at=node)
        graph.replace(node, result)
        assert result.producer is not None
        replaced[node] = result.producer
    return replaced


def _along(factors: Tensor, axis: int, weight: Tensor) -> Tensor:
    return factors.reshape([-1 if i == axis else 1 for i in range(weight.dim())])


def scalable(site: Node) -> Scalable | Decline:
    """The input of a linear or conv, if its channels can be scaled at no cost, or why not."""
    value, readers = site.input, list(site.input.users)
    if value.is_output:
        return Decline("input_returned")
    other = next((node for node in readers if node.kind != site.kind or node.input != value), None)
    if other is not None:
        return Decline("input_shared", op=other.kind, site=other.label)
    for node in readers:
        if why := why_fixed(node) or _why_not_float32(node) or _why_shared(node):
            return why
    shapes = [node.required("weight").shape for node in readers]
    groups = {node.attributes["groups"] if node.kind == "conv" else 1 for node in readers}
    channels = int(shapes[0][0 if groups != {1} else 1]) if shapes[0] else 0
    if groups != {1} and (groups != {channels} or any(shape is None or shape[1] != 1 for shape in shapes)):
        return Decline("conv_grouped")
    scaled = _scaled(value, site.kind)
    if isinstance(scaled, Decline):
        return scaled
    return Scalable(value, readers, scaled, channels)


def _multipliable(site: Node, sites: Collection[Node], context: Context) -> Scalable | None:
    """The input of a linear whose channels a product can scale, and the linears of the sites that read it; None where
    the value is in integers, or the target quantizes it as it computes it, so that a product would cost much more."""
    value, maker = site.input, site.input.producer
    readers = [node for node in value.users if node in sites and node.kind == "linear" and node.input == value]
    if site not in readers or value.dtype is not torch.float32 or is_dequantized(value) or _in_integers(value):
        return None
    if maker is not None and maker.kind in context.target.quantizes:
        return None
    if any(why_fixed(node) or _why_not_float32(node) or _why_shared(node) for node in readers):
        return None
    shape = site.required("weight").shape
    return Scalable(value, readers, (), int(shape[1])) if shape else None


def _in_integers(value: Value) -> bool:
    """Whether a conv makes a value, through ops that compute in or move integers: it may be in a quantized region."""
    node = value.producer
    if node is None or node.kind not in ("conv", "relu", "clip", *JOINED, *MOVES):
        return False
    return node.kind == "conv" or any(_in_integers(one) for one in node.operands if one is not None)


def _why_not_float32(node: Node) -> Decline | None:
    dtype = None if node.weight is None else node.weight.dtype
    return None if dtype is torch.float32 else not_float32("weight", dtype)


def _why_shared(node: Node) -> Decline | None:
    others = [user for user in node.required("weight").users if user != node]
    return Decline("weight_shared", op=others[0].kind, site=others[0].label) if others else None


def _alone(value: Value, node: Node) -> bool:
    """Whether a node is the only reader of a value, and reads it once: x * x would multiply its factors twice."""
    return value.users == (node,) and node.operands.count(value) == 1 and not value.is_output


def _keeps_rows(node: Node, reader: str) -> bool:
    """Whether a node reshapes only axes before the last one, which holds the channels of a linear."""
    if node.kind != "reshape" or reader != "linear":
        return False
    before, after = node.input.shape, node.result.shape
    if not before or not after:
        return False
    return isinstance(before[-1], int) and before[-1] == after[-1]


def _scaled(value: Value, reader: str) -> list[Node] | Decline:
    """The norm, linear or conv that a value comes from, and behind it the homogeneous ops, which nobody else reads."""
    node, behind = value.producer, list[Node]()
    while node is not None and (node.kind in (*_HOMOGENEOUS[reader], "mul") or _keeps_rows(node, reader)):
        if node.kind == "mul":
            found = [_scaled(side, reader) for side in node.operands if side is not None and _alone(side, node)]
            sides = [one for one in found if not isinstance(one, Decline)]
            return [*sides[0], node, *behind] if sides else Decline("mul_cannot_absorb", site=node.label)
        if not _alone(node.input, node):
            return Decline("read_before", op=node.kind, site=node.label)
        behind.insert(0, node)
        node = node.input.producer
    kinds = ("conv",) if reader == "conv" else ("layer_norm", "rms_norm", "linear")
    if node is None:
        return Decline("input_cannot_absorb")
    if node.kind not in kinds:
        return Decline("cannot_absorb", op=node.kind, site=node.label)
    if node.kind in ("layer_norm", "rms_norm") and node.required("weight").rank != 1:
        return Decline("norm_over_several_axes", op=node.kind, site=node.label)
    bias = node.operand("bias") if node.kind != "rms_norm" else None
    if node.weight is None or (bias is not None and not bias.is_constant) or _why_shared(node):
        return Decline("parameters_not_own", op=node.kind, site=node.label)
    return [node, *behind]
