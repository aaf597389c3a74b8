"""f(x, W1, b1), g(·, W2)  ->  f(x, W1[K], b1[K]), g(·, W2'[:, K]): only the units K stay, and shapes shrink.

x + f(x)  ->  x: whole residual branches go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal, get_args

from graphopt.analysis.groups import Group, groups
from graphopt.errors import UsageError
from graphopt.ir.cost import sizes
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph
from graphopt.numerics.sparsity import cubic
from graphopt.passes.prune import depth, sizing
from graphopt.passes.prune.budget import Candidate, Sizes
from graphopt.passes.prune.costs import CostModel, cut
from graphopt.passes.prune.importance import weigh
from graphopt.passes.prune.refit import compensate
from graphopt.passes.prune.selection import open_groups
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import Range
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import Selector
from graphopt.pipeline.zeros import MarkedUnits

Kind = Literal["neurons", "heads", "channels", "pooler", "width"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OF_AMOUNT = tuple(kind for kind in KINDS if kind not in ("pooler", "width"))
"""The kinds of units that `amount` cuts: what is inside a layer that sees all positions."""
BUDGETS = ("flops", "params", "latency")
UNIT_OPTIONS = ("criterion", "scope", "compensate", "round_to")
"""What says nothing of layers."""
Share = Annotated[float, Range(0, 1, open_high=True)]
Budget = Annotated[float, Range(0, 1, open_low=True, open_high=True)] | None


@dataclass(frozen=True)
class Prune(Pass):
    """Remove whole neurons, heads, channels, positions of the width, or layers: those that matter least (Li et al.,
    2017).

    A group holds the units of all axes that shrink together (`graphopt.analysis.groups`), and is called by its first
    producer. Give one amount for all kinds of inner units, the share of units to remove for each kind, or one budget
    for the model. A kind that the model does not have is skipped with a note, and only where nothing is left to cut
    this is an error: one recipe fits many models. With criterion=movement nothing is removed yet: the `distill` or
    `finetune` behind it learns which units go, those that training moves towards 0 (Sanh et al., 2020), and cuts them.
    Declined: groups that cannot shrink (of the model's outputs, say), and those that keep all their units.

    Layers are residual branches (`graphopt.analysis.branches`): attention and feed-forward sublayers, the convs beside
    an identity shortcut. They go before all else, one after the other: each time the one without which the outputs on
    8 calibration batches (without any, the example inputs) move least. Declined: those that stay, those that other
    nodes read, and those whose sum has another shape.
    """

    name = "prune"
    stage = Stage.PRUNE
    changes_weights = True
    whole_model_options = MappingProxyType(dict.fromkeys((*BUDGETS, "layers"), "neurons=0.5"))
    former_options = MappingProxyType({"importance": "criterion"})

    amount: Share = 0.0
    """Share of the neurons, of the heads and of the channels to remove, at least 0 and below 1; never of the pooler or
    the width."""

    neurons: Share = 0.0
    """Share of the inner neurons of feed-forward pairs, and of the hidden units of recurrent layers, to remove."""

    heads: Share = 0.0
    """Share of the attention heads to remove."""

    channels: Share = 0.0
    """Share of the channels of convolutions to remove."""

    pooler: Share = 0.0
    """Share of the neurons to remove from linears that read one position of the sequence, such as BERT's pooler. They
    cost little, and all that a classifier knows of a text goes through them."""

    width: Share = 0.0
    """Share of the width of a transformer's residual stream to remove; consumers after norms are not compensated."""

    layers: Share = 0.0
    """Share of the residual branches to remove, whole; one stays at least."""

    flops: Budget = None
    """Share of the model's FLOPs to keep, in (0, 1); in place of the shares by kind."""

    params: Budget = None
    """Share of the model's parameters to keep."""

    latency: Budget = None
    """Share of the model's time to keep, measured on the target at the example shapes."""

    kinds: tuple[Kind | Literal["layers"], ...] = ("neurons", "channels")
    """Kinds that a budget cuts; layers stand alone. Heads cost more quality: at 0.55 of the FLOPs, all-MiniLM-L6-v2 in
    int8 loses 0.4 in Spearman on STS-B dev where neurons alone are removed, and 1.4 where heads are removed in the same
    share."""

    criterion: Literal["auto", "l1", "l2", "activation", "taylor", "movement", "random"] = "auto"
    """How units are ranked: l1, l2, activation, taylor, movement (by the training behind it), random; auto is
    activation with calibration data, else l2."""

    scope: Literal["layer", "global"] = "layer"
    """What units are ranked against: those of their group, each of which loses the same share (layer), or all units of
    the model (global)."""

    schedule: Literal["none", "cubic"] = "none"
    """Inside `repeat`: whether what goes grows over the rounds to what was asked for (cubic: fast at first, Zhu &
    Gupta, 2017), as a share of the model before the first of them."""

    compensate: bool | None = None
    """Solve consumers' weights again on the calibration data (He et al., 2017); none: where there is such data."""

    round_to: Annotated[int, Range(1)] | None = None
    """Multiple of the sizes that stay, except for heads; none: as the target prefers. Halved for a group of fewer than
    four such multiples, and where a budget would be missed by 2%."""

    seed: int = 0
    """Of criterion=random."""

    targets: Selector = Selector("linear", "conv", "embedding", "conv_transpose", "lstm", "gru", "rnn")
    """Groups to consider: by their names, or by their producers, else consumers (ops, module paths or patterns)."""

    ignore: Selector = Selector()
    """Groups to leave as they are; the name of a group means that one only."""

    @property
    def needs_torch(self) -> bool:
        return self.criterion == "taylor"

    def contradiction(self) -> str | None:
        shares = [kind for kind in (*KINDS, "layers") if getattr(self, kind)]
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        amount = ["amount"] if self.amount else []
        if len(amount) + bool(shares) + len(budgets) != 1:
            given = f", and not {' and '.join(amount + shares + budgets)}" if amount or shares or budgets else ""
            kinds, of_model = ", ".join((*KINDS, "layers")), ", ".join(BUDGETS)
            return f"give amount, shares by kind ({kinds}), or one budget ({of_model}){given}"
        if not self.kinds:
            return f"kinds is empty; give some of {', '.join(KINDS)}"
        if self.kinds != Prune.kinds and not budgets:
            return "kinds are those that a budget cuts; give a share for each instead"
        if len(self.kinds) > 1 and "layers" in self.kinds:
            return "a budget cuts layers or units; give each a prune of its own"
        if "layers" in (shares or self.kinds):
            if self.marks:
                return "movement learns which units go, and layers go whole: give them a prune of their own"
            ranked = [option for option in UNIT_OPTIONS if getattr(self, option) != getattr(Prune, option)]
            if ranked and len(shares or self.kinds) == 1:
                return f"{ranked[0]} is for units, and layers go whole, by their damage"
        if self.seed != Prune.seed and self.criterion != "random":
            return f"seed is for criterion=random, and criterion is {self.criterion}"
        if self.schedule != "none" and budgets:
            return f"schedule lets the share of a kind grow; give amount, or shares by kind, in place of {budgets[0]}"
        if self.marks and self.scope == "global":
            return "movement ranks the units of each group by themselves; use scope=layer"
        if self.marks and self.compensate:
            return "the training behind movement makes up for what goes; leave compensate out"
        return None

    @property
    def measures(self) -> bool:
        return self.latency is not None

    @property
    def marks(self) -> bool:
        return self.criterion == "movement"

    def run(self, graph: Graph, context: Context) -> None:
        units = self._units
        compensates = context.calibration is not None if self.compensate is None else self.compensate
        compensates = compensates and not self.marks
        if context.calibration is not None and units and context.batches().once:
            reads = self.layers > 0, self.criterion in ("auto", "activation", "taylor"), compensates
            if sum(reads) > 1:
                raise UsageError(
                    "prune reads the calibration batches twice, to weigh what goes and to compensate, and a generator "
                    "gives them once; pass a list or a DataLoader, or use compensate=false or criterion=l2"
                )
        removed = self._remove_layers(graph, context, required=not units)
        if units:
            self._cut_units(graph, context, units, compensates, required=not removed)

    @property
    def _units(self) -> Sequence[str]:
        """The kinds of units that are cut."""
        if self.layers or self._shares:
            return list(self._shares)
        return [kind for kind in self.kinds if kind != "layers"]

    def _remove_layers(self, graph: Graph, context: Context, *, required: bool) -> bool:
        """Whether there are branches that may go; where they are required and there are none, this is an error."""
        chosen = depth.Choice(self.targets, self.ignore, named=self.targets != Prune.targets, required=required)
        if self.layers:
            return depth.remove_share(graph, context, self._share(self.layers, context), chosen)
        if "layers" in self.kinds:
            of = next(name for name in BUDGETS if getattr(self, name) is not None)
            return depth.remove_within(graph, context, of, getattr(self, of), chosen)
        return False

    def _cut_units(
        self, graph: Graph, context: Context, kinds: Sequence[str], compensates: bool, *, required: bool
    ) -> None:
        scores = weigh(graph, context, self._groups(graph, context, kinds, required), self.criterion, self.seed)
        candidates = [Candidate(group, score, self._multiple(group, context)) for group, score in scores.items()]
        chosen = self._sizes(graph, context, candidates)
        smaller = {candidate: size for candidate, size in chosen.items() if size < candidate.group.size}
        for group in (candidate.group for candidate in chosen if candidate not in smaller):
            context.record.decline(group.name, Decline("no_units_go", size=group.size, kind=group.kind))
        sizing.note_sizes(context, {candidate.group: size for candidate, size in smaller.items()})
        if self.marks:
            context.marks.units |= {one.group.name: MarkedUnits(one.group.size, size) for one, size in smaller.items()}
            if smaller:
                context.note("nothing is cut yet: the training behind it learns which units go")
            return
        names = [group.name for group in groups(graph)]
        if compensates:
            compensate(graph, context, {candidate.group: candidate.units(size) for candidate, size in smaller.items()})
        cut(graph, smaller, names)

    @property
    def _shares(self) -> dict[str, float]:
        """By kind, the share of its units to remove; empty where a budget is given."""
        if self.amount:
            return dict.fromkeys(OF_AMOUNT, self.amount)
        return {kind: getattr(self, kind) for kind in KINDS if getattr(self, kind)}

    def _groups(self, graph: Graph, context: Context, kinds: Sequence[str], required: bool) -> list[Group]:
        """The groups that may be cut. A note names each kind that has a share and no such group."""
        named = self.targets != Prune.targets
        found = open_groups(graph, context, kinds, self.targets, self.ignore, named=named, required=required)
        for kind in self._shares:
            if not any(group.kind == kind for group in found):
                context.note(f"{kind}: no group that may be cut")
        return found

    def _multiple(self, group: Group, context: Context) -> int:
        if group.kind == "heads":
            return 1
        if self.round_to is not None:
            return self.round_to
        return context.target.round_to.get("neurons" if group.kind == "pooler" else group.kind, 1)

    def _sizes(self, graph: Graph, context: Context, candidates: list[Candidate]) -> Sizes:
        """How many units of each stay, by the shares or the budget."""
        together = self.scope == "global"
        for name in BUDGETS:
            if getattr(self, name) is not None:
                return sizing.within_budget(graph, context, candidates, name, getattr(self, name), together)
        shares = {kind: self._share(share, context) for kind, share in self._shares.items()}
        chosen = sizing.by_shares(context, candidates, shares, together)
        model = CostModel(graph, candidates, sizes(graph, context.feeds[0]) if context.feeds else {})
        if model.flops and any(size < candidate.group.size for candidate, size in chosen.items()):
            context.note(f"{model.share_left('flops')(chosen):.3f} of the FLOPs stay")
        return chosen

    def _share(self, whole: float, context: Context) -> float:
        """What goes in this round of a `repeat`, as a share of the units that the rounds before it left."""
        if self.schedule == "none":
            return whole
        number, rounds = context.round
        left, left_before = (1 - whole * cubic(done / rounds) for done in (number, number - 1))
        return 1 - left / left_before
