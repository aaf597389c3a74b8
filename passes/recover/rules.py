"""What holds the weights of a training to their form: zeros that stay or move, and what movement pruning removes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from graphopt.analysis.groups import Group, groups
from graphopt.analysis.shrink import shrink
from graphopt.errors import UsageError
from graphopt.ir.graph import Graph, Node
from graphopt.numerics.sparsity import Pattern
from graphopt.passes.prune.sizing import note_sizes
from graphopt.passes.sparsify.zeros import Zeros
from graphopt.pipeline.context import Context
from graphopt.pipeline.zeros import KeptZeros, Marks
from graphopt.training.rules import (
    FixedZeros,
    Movement,
    MovingPattern,
    Together,
    UnitMovement,
    UnitScores,
    WeightRule,
    ZeroRule,
)


@dataclass(frozen=True)
class _Place:
    """The weight of a site, and the parameter that stands for it."""

    parameter: str
    weight: Tensor
    """(out, in, ...), as the site reads it before the training."""
    transposed: bool
    """Whether the parameter is (in, out)."""

    def stored(self, mask: Tensor) -> Tensor:
        """A tensor like the weight, in the layout of the parameter; and the other way round."""
        return mask.T if self.transposed else mask


@dataclass(frozen=True)
class _Sparse:
    """A site whose weight has zeros, where they lie, and what decides which."""

    site: Node
    place: _Place
    pattern: str
    rule: ZeroRule


class Rules:
    """What each weight of one training keeps to (`training.rules`), and what is left to do in the graph afterwards."""

    def __init__(
        self, graph: Graph, module: nn.Module, context: Context, *, frozen: Collection[str], sr_ste: float | None
    ) -> None:
        """module: of the graph, before the training. frozen: names of its parameters that stay. Takes the marks of the
        context. Raises UsageError where a mark or `sr_ste` contradicts what is there."""
        self.graph, self.module, self.context, self.frozen, self.sr_ste = graph, module, context, frozen, sr_ste
        self.name = context.record.name
        self.marks, context.marks = context.marks, Marks()
        self.sparse: list[_Sparse] = []
        self.scores: dict[str, UnitScores] = {}
        """By the name of a group that is to shrink."""
        self._rules: dict[str, list[WeightRule]] = {}
        self._hold_zeros()
        self._weigh_units()

    @property
    def by_parameter(self) -> dict[str, WeightRule]:
        return {name: rules[0] if len(rules) == 1 else Together(rules) for name, rules in self._rules.items()}

    def finish(self) -> None:
        """The best weights are in the module and in the graph: note where zeros are now, and cut the units that go."""
        for one in self.sparse:
            mask = one.rule.kept(self.module.get_parameter(one.place.parameter).detach()).cpu()
            self.context.sparse[one.site.label] = KeptZeros(one.pattern, one.place.stored(mask))
        if not self.marks:
            return
        self.context.is_lossy = True
        cuts = {group: self.scores[group.name] for group in groups(self.graph) if group.name in self.scores}
        note_sizes(self.context, {group: scores.stay for group, scores in cuts.items()})
        shrink(self.graph, {group: scores.units().cpu() for group, scores in cuts.items()})
        self._note_zeros()

    def _note_zeros(self) -> None:
        """How many of the weights are zero now that had none."""
        before = {one.site.label: one for one in self.sparse if isinstance(one.rule, Movement)}
        found: dict[str, Zeros] = {}
        for site in self.graph.sites("linear", "conv"):
            if site.label in before:
                one = before.pop(site.label)
                found.setdefault(one.pattern, Zeros()).add(one.place.weight, self._read(site))
        for pattern, zeros in found.items():
            for note in zeros.notes(self.context.target, pattern):
                self.context.note(note)

    # --- zeros -------------------------------------------------------------------------------------------------------

    def _hold_zeros(self) -> None:
        known: dict[str, _Sparse] = {}
        for site in self.graph.sites("linear", "conv"):
            named = site.label in self.context.sparse or site.label in self.marks.zeros
            place = self._place(site) if named or (self.context.sparse and not site.path) else None
            if place is None:
                continue
            if place.parameter not in known:
                if place.parameter in self.frozen and site.label in self.marks.zeros:
                    raise UsageError(
                        f"{self.name}: freeze keeps the weight of {site.label}, and sparsify{{criterion=movement}} in "
                        f"front of it asks for zeros there: let it be trained, or name it in ignore of sparsify"
                    )
                found = None if place.parameter in self.frozen else self._zeros(site, place)
                if found is None:
                    continue
                known[place.parameter] = found
                self._rules.setdefault(place.parameter, []).append(found.rule)
            self.sparse.append(replace(known[place.parameter], site=site))
        labels = {one.site.label for one in self.sparse}
        if lost := [label for label in self.marks.zeros if label not in labels]:
            raise UsageError(
                f"{self.name}: {lost[0]} was marked by sparsify{{criterion=movement}}, and has no weight to train any "
                f"more: put {self.name} right behind sparsify"
            )
        if self.sr_ste is not None and not any(isinstance(one.rule, MovingPattern) for one in self.sparse):
            raise UsageError(
                f"{self.name}: sr_ste lets the zeros of an N:M pattern move, and there are none: put "
                "sparsify{pattern=2:4} in front of it"
            )

    def _zeros(self, site: Node, place: _Place) -> _Sparse | None:
        """What the weight of a site keeps to; None where it has no zeros, and none are asked for."""
        kept, marked = self._kept(site, place.weight), self.marks.zeros.get(site.label)
        mask = None if kept is None or kept.mask is None else place.stored(kept.mask)
        if marked is not None:
            if self.sr_ste is not None and kept is not None:
                raise UsageError(
                    f"{self.name}: sr_ste lets the zeros of {site.label} move, and sparsify{{criterion=movement}} adds "
                    "others to them: leave sr_ste out"
                )
            shape, pattern = place.stored(place.weight).shape, Pattern.parse(marked.pattern)
            rule = Movement(shape, pattern, marked.share, transposed=place.transposed, stays=mask)
            return _Sparse(site, place, marked.pattern, rule)
        if kept is None or mask is None:
            return None
        if self.sr_ste is None:
            return _Sparse(site, place, kept.pattern, FixedZeros(mask))
        pattern = Pattern.parse(kept.pattern)
        if pattern.amount is None:
            raise UsageError(
                f"{self.name}: sr_ste lets the zeros of an N:M pattern move, and those of {site.label} are "
                f"{kept.pattern}: leave sr_ste out, or use sparsify{{pattern=2:4}}"
            )
        if axis := pattern.undivided_axis(place.weight.shape):
            raise UsageError(
                f"{self.name}: sr_ste needs the pattern {kept.pattern}, and {axis[1]} along the {axis[0]} axis of "
                f"{site.label} is no multiple of {axis[2]} any more: prune before sparsify"
            )
        return _Sparse(site, place, kept.pattern, MovingPattern(pattern, self.sr_ste, place.transposed))

    def _kept(self, site: Node, weight: Tensor) -> KeptZeros | None:
        """The zeros that a site must keep, with their mask; None where it has none.

        They are those that the weight has now where a pass has changed it since, so that the mask does not fit it, and
        where an earlier call left them, which keeps no masks.
        """
        kept = self.context.sparse.get(site.label)
        if kept is None and not site.path:  # it may have had another name: its zeros tell
            kept = next((one for one in self.context.sparse.values() if _fits(one, weight)), None)
        if kept is None:
            return None
        mask = kept.mask if _fits(kept, weight) else weight != 0
        return None if mask is None or bool(mask.all()) else KeptZeros(kept.pattern, mask)

    # --- units -------------------------------------------------------------------------------------------------------

    def _weigh_units(self) -> None:
        there = {group.name: group for group in groups(self.graph)} if self.marks.units else {}
        for name, marked in self.marks.units.items():
            group = there.get(name)
            if group is None or group.size != marked.size or group.locked:
                raise UsageError(
                    f"{self.name}: {name} was marked by prune{{criterion=movement}} as a group of {marked.size} units, "
                    f"which it is no more: put {self.name} right behind prune"
                )
            self.scores[name] = UnitScores(marked.size, marked.stay)
            self._weigh_group(group, self.scores[name])

    def _weigh_group(self, group: Group, scores: UnitScores) -> None:
        units = {axis.value: axis.units for axis in group.axes if axis.axis == 1}
        for weight, site in {site.required("weight"): site for site in group.consumers}.items():
            place = self._place(site)
            if place is None or place.parameter in self.frozen:
                raise UsageError(
                    f"{self.name}: freeze keeps the weight of {site.label}, and prune{{criterion=movement}} in front "
                    f"of it removes {group.kind} of {group.name}, which it reads: let it be trained, or name "
                    f"{group.name} in ignore of prune"
                )
            rule = UnitMovement(scores, 0 if place.transposed else 1, units[weight])
            self._rules.setdefault(place.parameter, []).append(rule)

    # --- weights -----------------------------------------------------------------------------------------------------

    def _place(self, site: Node) -> _Place | None:
        """The weight of a site and its parameter; None where it is computed."""
        name = self.graph.parameter(self.module, site.required("weight"))
        if name is None:
            return None
        weight, parameter = self._read(site), self.module.get_parameter(name).detach()
        is_same = weight.shape == parameter.shape and torch.equal(weight, parameter)
        return _Place(name, weight, transposed=weight.dim() == 2 and not is_same)

    def _read(self, site: Node) -> Tensor:
        """The weight as a site reads it, dequantized where it is stored in integers."""
        return self.graph.evaluate({}, [site.required("weight")])[0]


def _fits(kept: KeptZeros, weight: Tensor) -> bool:
    """Whether a weight is zero where the mask says so."""
    return kept.mask is not None and kept.mask.shape == weight.shape and not bool(weight[~kept.mask].any())
