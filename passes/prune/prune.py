"""f(x, W1, b1), g(·, W2)  ->  f(x, W1[K], b1[K]), g(·, W2'[:, K]), without the units outside K: shapes shrink."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.analysis.groups import Group, groups
from graphopt.errors import UsageError
from graphopt.ir.cost import sizes
from graphopt.ir.graph import Graph
from graphopt.passes.prune import budget, sizing
from graphopt.passes.prune.budget import Candidate, CostModel, Sizes
from graphopt.passes.prune.importance import IMPORTANCE, weigh
from graphopt.passes.prune.refit import compensate
from graphopt.passes.prune.selection import open_groups
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import Selector
from graphopt.pipeline.spelling import value_text

KINDS = ("neurons", "heads", "channels", "width")
BUDGETS = ("flops", "params", "latency")


@dataclass(frozen=True)
class Prune(Pass):
    """Remove what matters least: whole neurons, heads, channels, or positions of the width (Li et al., 2017).

    What shrinks together is a group (`graphopt.analysis.groups`): it is eligible under the name of its first
    producer, and declined where something locks it. Give a share for each kind, or one budget for all.
    """

    name = "prune"
    stage = Stage.PRUNE

    neurons: float = 0.0
    """Share of the inner neurons of feed-forward pairs that goes, at least 0 and below 1."""

    heads: float = 0.0
    """Share of the attention heads that goes."""

    channels: float = 0.0
    """Share of the channels of convolutions that goes."""

    width: float = 0.0
    """Share of the residual stream of a transformer that goes; what norms make of the rest is not compensated."""

    flops: float | None = None
    """Share of the model's FLOPs that stays, in (0, 1); in place of the shares by kind."""

    params: float | None = None
    """Share of the model's parameters that stays."""

    latency: float | None = None
    """Share of the time on the target, measured at the example shapes, that stays."""

    kinds: tuple[str, ...] = ("neurons", "channels")
    """Kinds that a budget cuts. Heads are dearer: at 0.55 of the FLOPs, all-MiniLM-L6-v2 in int8 loses 0.4 in Spearman
    on STS-B dev where neurons go alone, and 1.4 where heads go in the same share."""

    importance: str = "auto"
    """What ranks units: l1, l2, activation, taylor, random; auto is activation with calibration, else l2."""

    scope: str = "layer"
    """What units are ranked against: their own group, which loses the same share as others (layer), or all (global)."""

    compensate: bool | None = None
    """Solve consumers' weights again on the calibration data (He et al., 2017); none does where there is any."""

    round_to: int | None = None
    """Multiple of the sizes that stay, but for heads; none is the target's. Halved where a group is below four of it,
    and where a budget would be missed by 2%."""

    seed: int = 0
    """Of importance=random."""

    targets: Selector = Selector("linear", "conv", "embedding")
    """Groups to consider: by their names, or by producers, else consumers (ops, module paths or patterns)."""

    ignore: Selector = Selector()
    """Groups to leave as they are; the name of a group means that one only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = {kind: getattr(self, kind) for kind in KINDS}
        budgets = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        for name, value in (shares | budgets).items():
            low = "at least 0" if name in shares else "above 0"
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < 1 or (name in budgets and value == 0):
                raise UsageError(f"prune: {name} is {value!r}; give a number {low} and below 1")
        if len(budgets) + any(shares.values()) != 1:
            given = [*(kind for kind in KINDS if shares[kind]), *budgets]
            raise UsageError(
                f"prune: give shares by kind ({', '.join(KINDS)}), or one budget ({', '.join(BUDGETS)})"
                + (f", and not {' and '.join(given)}" if given else "")
            )
        choices = {"importance": ("auto", *IMPORTANCE), "scope": ("layer", "global"), "compensate": (None, True, False)}
        for name, options in choices.items():
            given = getattr(self, name)
            if not isinstance(given, str | bool | None) or given not in options:
                raise UsageError(f"prune: {name} is {given!r}; give {', '.join(map(value_text, options))}")
        object.__setattr__(self, "kinds", (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds))
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise UsageError(f"prune: kinds is {list(self.kinds)}; give some of {', '.join(KINDS)}")
        if self.kinds != Prune.kinds and not budgets:
            raise UsageError("prune: kinds are those that a budget cuts; give a share for each instead")
        if self.round_to is not None and (not _is_whole(self.round_to) or self.round_to < 1):
            raise UsageError(f"prune: round_to is {self.round_to!r}; give a whole number of at least 1")
        if not _is_whole(self.seed):
            raise UsageError(f"prune: seed is {self.seed!r}; give a whole number")
        if self.seed != Prune.seed and self.importance != "random":
            raise UsageError(f"prune: seed is for importance=random, and importance is {self.importance}")

    def run(self, graph: Graph, context: Context) -> None:
        solve = context.calibration is not None if self.compensate is None else self.compensate
        if solve and context.batches().once and self.importance in ("auto", "activation", "taylor"):
            raise UsageError(
                "prune reads the calibration batches twice, to weigh units and to compensate, and a generator gives "
                "them once; pass a list or a DataLoader, or use compensate=false or importance=l2"
            )
        scores = weigh(graph, context, self._groups(graph, context), self.importance, self.seed)
        candidates = [Candidate(group, score, self._multiple(group, context)) for group, score in scores.items()]
        chosen = self._sizes(graph, context, candidates)
        left = {one: size for one, size in chosen.items() if size < one.group.size}
        for one in chosen.keys() - left.keys():
            context.record.decline(one.group.name, f"all of its {one.group.size} {one.group.kind} stay")
        for kind in dict.fromkeys(one.group.kind for one in left):
            of_kind = [(one.group, size) for one, size in left.items() if one.group.kind == kind]
            context.note(f"{kind}: {', '.join(f'{group.name} {group.size} -> {size}' for group, size in of_kind)}")
        names = [group.name for group in groups(graph)]
        if solve:
            compensate(graph, context, {one.group: one.units(size) for one, size in left.items()})
        budget.cut(graph, left, names)

    def _groups(self, graph: Graph, context: Context) -> list[Group]:
        """The groups that may be cut; of each kind that has a share there must be one."""
        shares = [kind for kind in KINDS if getattr(self, kind)]
        named = self.targets != Prune.targets
        return open_groups(
            graph, context, shares or self.kinds, self.targets, self.ignore, required=shares, named=named
        )

    def _multiple(self, group: Group, context: Context) -> int:
        if group.kind == "heads":
            return 1
        if self.round_to is not None:
            return self.round_to
        return context.target.round_to.get(group.kind, 1)

    def _sizes(self, graph: Graph, context: Context, candidates: list[Candidate]) -> Sizes:
        """How many units of each stay, by the shares or the budget."""
        together = self.scope == "global"
        for name in BUDGETS:
            if getattr(self, name) is not None:
                return sizing.within_budget(graph, context, candidates, name, getattr(self, name), together)
        chosen = sizing.by_shares(context, candidates, {kind: getattr(self, kind) for kind in KINDS}, together)
        bill = CostModel(graph, candidates, sizes(graph, context.feeds[0]) if context.feeds else {})
        if bill.flops and any(size < one.group.size for one, size in chosen.items()):
            context.note(f"{bill.share('flops')(chosen):.3f} of the FLOPs stay")
        return chosen


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
