"""One call of `optimize` for several engines, or for several precisions of one: all results are raced.

An engine first runs the model as it is, and then each result, in a process of its own (`contestant`): what fails there,
crashes or hangs is never run in this process. The engines take turns, so that the programs of one at a time are in the
memory of this process; what they made waits in files until the race.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from graphopt.errors import GraphError, GraphoptError, LoweringError, UsageError, described, first_line
from graphopt.ir import cost
from graphopt.ir.graph import Feeds, Graph, digest, shapes_text, tensors_digest
from graphopt.lowering.backend import Backend
from graphopt.measure import cache, limits, machine, memory, timing
from graphopt.measure.cache import UNSURE
from graphopt.numerics import metrics
from graphopt.pipeline.instruments import Agree, Instrument, phase, watched
from graphopt.racing.contestant import Contestant, Lost, room
from graphopt.racing.figures import Figures, fastest, judged, timed
from graphopt.racing.fitting import ASKED, UNCOMPRESSED, Fitting, TooLittleMemory, fitting
from graphopt.report import figures as written
from graphopt.report.agreements import Agreement, worst_of_each
from graphopt.report.records import Entrant, Race
from graphopt.result import Optimized
from graphopt.run import Run


@dataclass(frozen=True)
class Candidate:
    """A lowered graph in one engine."""

    backend: Backend
    model: str
    """ASKED or UNCOMPRESSED."""
    graph: Graph
    make: Callable[[], Optimized]
    """The result, should it be taken."""
    planned: float | None = None
    """Of what a lossy pipeline made: the SQNR (dB) that its passes leave, before anything is reverted or lowered."""
    rounds: bool = False
    """Whether it rounds what the model does not."""
    why_out: str = ""
    """Why it cannot win, and is only compared with."""

    @property
    def label(self) -> str:
        """Unique in a race."""
        return label(self.backend, self.model)

    @cached_property
    def digest(self) -> str:
        """Of the graph."""
        return digest(self.graph)


def label(backend: Backend, model: str) -> str:
    """What a candidate is called."""
    parts = backend.name, "" if model == ASKED else model, "" if backend.precision == "float32" else backend.precision
    return " ".join(filter(None, parts))


@dataclass
class Contest:
    """Several engines, and how each is run."""

    backends: Sequence[Backend]
    """In the fixed order, which counts where nothing is measured."""
    run: Callable[[Backend], Run]
    """The run for one engine. Raises a GraphoptError where it does not take the model."""
    guarded: Callable[[Run], AbstractContextManager[None]]
    """Lets nothing but a GraphoptError out of a run."""
    within: float
    """How far below the best quantized candidate's the SQNR of the result may be, in dB."""
    precisions: Mapping[str, str]
    """By engine, what its floats are computed in where a pass is lossy: auto, or one of PRECISIONS."""
    threads: int | None
    instruments: Sequence[Instrument]
    absent: Mapping[str, str] = field(default_factory=dict)
    """Engines that nobody named and that are not here, and why."""

    _candidates: list[Candidate] = field(default_factory=list)
    _refused: dict[str, GraphoptError] = field(default_factory=dict)
    """Engines that have no candidate, and why."""
    _contestants: dict[str, tuple[str, Contestant]] = field(default_factory=dict)
    """By the label of a candidate, the digest of the graph that its process has loaded."""
    _feeds: list[Feeds] = field(default_factory=list)
    _reference: Agree | None = None
    _fitting: Fitting | None = None

    def result(self) -> Optimized:
        """The fastest result that is close enough to the original; as `first` where nothing can be timed, as there are
        no inputs or the model is too large to be run, and where one engine has no room to race its precisions.

        Raises UsageError where memory is too small for any race of several engines, and where no files can be written,
        and what the first engine raised where none has a result.
        """
        with ExitStack() as stack:
            try:
                kept = tempfile.TemporaryDirectory(prefix="graphopt-", ignore_cleanup_errors=True)
                self._folder = Path(stack.enter_context(kept))
            except OSError as error:
                raise UsageError("a race keeps files in a temporary folder, and there is none to write to "
                                 f"({described(error)}): make room, or set TMPDIR") from error  # fmt: skip
            stack.callback(self._close)  # before the folder goes, as the processes use it
            for backend in self.backends:
                try:
                    run = self.run(backend)
                    if not run.is_timed or not self._has_room(run):
                        return self.first()
                    self._enter(run)
                except TooLittleMemory:
                    raise
                except GraphoptError as error:
                    self._refused[backend.name] = error
            if not self._candidates:
                raise next(iter(self._refused.values()))
            return self._taken(self._figures())

    def first(self) -> Optimized:
        """The result of the first engine, in the fixed order, that has one: nothing is measured."""
        for backend in self.backends:
            try:
                run = self.run(backend)
                with self.guarded(run):
                    small = self._in_precision(run, run.result())
            except GraphoptError as error:
                self._refused[backend.name] = error
                continue
            small.report.notes += self._left_out()
            if len(self.backends) > 1:
                order = ", ".join(one.name for one in self.backends)
                small.report.notes.append(f"nothing is measured: this is the first engine that takes the model, in the "
                                          f"fixed order {order}")  # fmt: skip
                entrant = Entrant(backend.name, ASKED, small.backend.precision, _worst(small.report.agreement))
                shapes = [shapes_text(feeds) for feeds in run.captured.feeds]
                small.report.race = Race([entrant, *self._outsiders()], 0, None, shapes)
            return small
        raise next(iter(self._refused.values()))

    # --- the candidates ----------------------------------------------------------------------------------------------

    def _enter(self, run: Run) -> None:
        """Make the candidates of one engine. Raises a GraphoptError where there is none."""
        backend, asked = run.backend, self.precisions[run.backend.name]
        backend.at("float32" if asked == "auto" else asked)
        self._fits(run).require(backend.name)
        if self._reference is None:
            self._feeds = run.captured.feeds
            self._reference = Agree(run.captured.graph, self._feeds, run.captured.signature.outputs)
        with phase(self.instruments, f"try {backend.name}"):
            run.original = self._original(run)
        run.trial = partial(self._trial, backend, ASKED)
        with self.guarded(run):
            small = run.result()
        self._candidates += list(self._found(run, small))
        run.release()

    def _fits(self, run: Run) -> Fitting:
        """Which candidates fit into memory, seen with the first model that was captured."""
        if self._fitting is None:
            size = cost.Cost.of(run.captured.graph).bytes
            self._fitting = fitting(
                self.backends, self.precisions, size=size, free=memory.available(), is_lossy=run.is_lossy
            )
        return self._fitting

    def _has_room(self, run: Run) -> bool:
        """Whether there is a race: of one engine, with something to race against. Raises TooLittleMemory where several
        were to be raced, and not one of them fits."""
        fits = self._fits(run)
        if len(self.backends) == 1:
            return len({precision for _, _, precision in fits.taken}) > 1
        if not fits.taken:
            raise TooLittleMemory(
                f"a race of {len(self.backends)} engines needs about {written.size(fits.all)} of memory for this "
                f"model, and {written.size(fits.free or 0)} are free, too little for one of them: give one target"
            )
        return True

    def _left_out(self) -> list[str]:
        """What the user should know of candidates that did not fit."""
        note = None if self._fitting is None else self._fitting.note()
        return [] if note is None else [note]

    def _original(self, run: Run) -> Graph:
        """The model as it is, in the first form that runs. Raises LoweringError where none does."""
        failure: LoweringError | None = None
        for graph in run.originals():
            try:
                self._trial(run.backend, UNCOMPRESSED, graph)
            except LoweringError as error:
                failure = error
            else:
                return graph
        assert failure is not None  # there is at least one form
        raise failure

    def _found(self, run: Run, small: Optimized) -> Iterator[Candidate]:
        """What an engine made of the model, and the model as it is, in each precision that is open."""
        backend, original = run.backend, run.original
        assert original is not None  # as `_enter` has found it
        small.__dict__.pop("runner", None)  # one engine's programs at a time
        asked, fits = self.precisions[backend.name], self._fits(run).taken
        why_out = "" if asked in ("auto", "float32") else f"precision={asked} was asked for"
        planned, rounds = (_planned(run, small), _is_whole(run, small)) if run.is_lossy else (None, False)
        plain = Candidate(backend, UNCOMPRESSED, original, run.uncompressed, why_out=why_out)
        made = Candidate(backend, ASKED, small.lowered, lambda: small, planned, rounds, why_out)
        is_made = made.digest != plain.digest
        if is_made:
            yield made
        yield plain if is_made else replace(plain, planned=planned)
        for precision in backend.precisions[1:]:
            other = backend.at(precision)
            if is_made and (backend.name, ASKED, precision) in fits:
                lowered = run.lowered_at(precision, small)
                yield Candidate(other, ASKED, lowered, partial(run.at, precision, small, lowered), planned, rounds=True)
            if (backend.name, UNCOMPRESSED, precision) in fits:
                graph = run.original_at(precision)
                make = partial(_uncompressed_at, run, precision, graph)
                yield Candidate(other, UNCOMPRESSED, graph, make, rounds=True)

    def _in_precision(self, run: Run, small: Optimized) -> Optimized:
        """The result in the precision that was asked for by name. Raises LoweringError where that breaks `within`."""
        precision = self.precisions[run.backend.name]
        if precision in ("auto", "float32"):
            return small
        found = run.at(precision, small, run.lowered_at(precision, small))
        best, least = (_worst(one.report.agreement) for one in (small, found))
        planned = _planned(run, small)
        best = best if best is None or planned is None else min(best, planned)
        if best is not None and least is not None and not least >= best - self.within:
            raise _breaks_within(precision, least, best, self.within)
        return found

    # --- processes ---------------------------------------------------------------------------------------------------

    def _trial(self, backend: Backend, model: str, graph: Graph) -> None:
        """Run a lowered graph in a process of its own, unless it is known to run. Raises LoweringError."""
        candidate = Candidate(backend, model, graph, _not_taken)
        key = self._key("trial", [candidate])
        if cache.opened().get(key) is None:
            try:
                self._contestant(candidate)
            except Lost as lost:
                raise LoweringError(f"{backend.name} does not run the model ({model}): it {lost}") from lost
            cache.opened().put(key, {"form": "runs", "ratios": {}, "dropped": {}})

    def _contestant(self, candidate: Candidate) -> Contestant:
        """The process of a candidate, started where it has none. Raises Lost."""
        kept, found = self._contestants.get(candidate.label, ("", None))
        if found is not None and kept == candidate.digest:
            return found
        if found is not None:
            self._end(candidate.label)
        with room():
            folder = Path(tempfile.mkdtemp(dir=self._folder))
        reference = next((other.first_seconds for _, other in self._contestants.values()), ())
        found = Contestant(candidate.backend, candidate.graph, self._feeds, folder, self.threads, reference=reference)
        self._contestants[candidate.label] = candidate.digest, found
        return found

    def _end(self, label: str) -> None:
        """End the process of a candidate."""
        _, contestant = self._contestants.pop(label)
        contestant.close()

    def _close(self) -> None:
        for label in list(self._contestants):
            self._end(label)

    # --- the race ----------------------------------------------------------------------------------------------------

    def _figures(self) -> Figures:
        """What the race measures; from the cache where the same candidates ran before."""
        key = self._key("race", self._candidates)
        kept = cache.opened().get(key)
        if kept is not None:
            return Figures.of(kept)
        with (
            phase(self.instruments, "race") as now,
            watched(self.instruments, "race", timing.ROUNDS) as advance,
        ):
            found = self._raced(advance)
            now.result = f"{len(found.speeds)} candidates"
        if not found.transient:  # they may run at the next call
            cache.opened().put(key, found.kept(), math.inf if found.steady else UNSURE)
        return found

    def _raced(self, advance: Callable[[str], None]) -> Figures:
        running: dict[str, Contestant] = {}
        lost: dict[str, str] = {}
        transient: tuple[str, ...] = ()
        for candidate in self._candidates:
            try:
                running[candidate.label] = self._contestant(candidate)
            except Lost as error:
                lost[candidate.label] = str(error)
                transient += (candidate.label,) if error.transient else ()
        sqnrs = {}
        for name, contestant in running.items():
            try:
                sqnrs[name] = self._sqnr(contestant)
            except GraphError as error:
                lost[name] = first_line(error)
        calls = {name: contestant.calls for name, contestant in running.items() if name in sqnrs}
        baselines = [one.label for one in self._candidates if one.model == UNCOMPRESSED]
        # Another precision may be too far from the original to win, and those behind it are to be timed then.
        leaders = {one.label for one in self._candidates if one.backend.precision == "float32" and not one.why_out}
        try:
            found = timed(calls, baselines, leaders=leaders, on_round=advance)
        except Lost as error:
            raise LoweringError(f"no engine came to the end of the race: {error}") from error
        for label in found.lost:
            self._end(label)
        return replace(found, lost=lost | found.lost, sqnrs=sqnrs, transient=transient + found.transient)

    def _sqnr(self, contestant: Contestant) -> float:
        """Of the worst output that holds floats. Raises GraphError where a shape differs, or numbers become NaN."""
        assert self._reference is not None  # as there is a candidate
        outputs = iter([contestant.outputs(shape) for shape in range(contestant.number)])
        by_shapes, _ = self._reference.compare(lambda feeds: next(outputs))
        found = _worst(worst_of_each(by_shapes.values()))
        return math.inf if found is None else found

    def _key(self, what: str, candidates: Sequence[Candidate]) -> dict[str, Any]:
        return {
            "choice": what,
            "graphopt": machine.version("graphopt"),
            "engine": ", ".join(dict.fromkeys(one.backend.engine() for one in candidates)),
            "machine": machine.machine(),
            "threads": self.threads,
            "result": {one.label: one.digest for one in candidates},
            "inputs": [tensors_digest(feeds) for feeds in self._feeds],
            "shapes": [[list(tensor.shape) for tensor in feeds.values()] for feeds in self._feeds],
        }

    # --- the result --------------------------------------------------------------------------------------------------

    def _taken(self, figures: Figures) -> Optimized:
        """The winner, with the race in its report, and what it exports for the other engines."""
        entrants = [self._entrant(one, figures) for one in self._candidates]
        planned = {place: one.planned for place, one in enumerate(self._candidates) if one.planned is not None}
        rounding_places = {place for place, one in enumerate(self._candidates) if one.rounds}
        ruled, least = judged(entrants, planned, rounding_places, self.within)
        self._require_precision(ruled, entrants, least)
        order = fastest(ruled)
        if not order:
            raise LoweringError("no engine can be taken: " + "; ".join(
                f"{one.label}: {entrant.why_out}" for one, entrant in zip(self._candidates, ruled, strict=True)
            ))  # fmt: skip
        place = order[0]
        winner, base = self._candidates[place], [one.label for one in self._candidates].index(figures.baseline)
        shapes = [shapes_text(feeds) for feeds in self._feeds]
        small = winner.make()
        report = small.report
        report.race = Race([*ruled, *self._outsiders()], place, base, shapes, least, figures.steady)
        report.set_speed(shapes, figures.speeds[winner.label].shapes)
        small.set_roofline(limits.measured(), [one / 1000 for one in ruled[place].milliseconds])
        report.notes += self._left_out()
        report.notes.append(f"raced, {winner.label} is the fastest of {len(order)}; speed is over {figures.baseline}")
        for other in order[1:]:
            times = zip(shapes, ruled[place].milliseconds, ruled[other].milliseconds, strict=True)
            if slower := [text for text, ours, others in times if others < ours]:
                report.notes.append(f"{self._candidates[other].label} is faster at {', '.join(slower)}")
        small.others = self._by_suffix(order)
        return small

    def _entrant(self, candidate: Candidate, figures: Figures) -> Entrant:
        name, why_out = candidate.label, candidate.why_out
        speed = figures.speeds.get(name)
        return Entrant(
            candidate.backend.name,
            candidate.model,
            candidate.backend.precision,
            figures.sqnrs.get(name),
            () if speed is None else figures.milliseconds(name),
            None if speed is None else (speed.overall.median, speed.overall.low, speed.overall.high),
            figures.lost.get(name, why_out),
        )

    def _outsiders(self) -> list[Entrant]:
        """Engines without a candidate, and why."""
        why = {name: first_line(error) for name, error in self._refused.items()} | dict(self.absent)
        return [Entrant(name, ASKED, "-", why_out=reason) for name, reason in why.items()]

    def _require_precision(self, ruled: Sequence[Entrant], entrants: Sequence[Entrant], least: float | None) -> None:
        """Raise LoweringError where the one engine was to compute in a precision that breaks `within`."""
        for before, after in zip(entrants, ruled, strict=True):
            asked = len(self.backends) == 1 and self.precisions[after.engine] == after.precision != "float32"
            if asked and after.model == ASKED and after.why_out and not before.why_out:
                if least is None or after.sqnr is None:
                    raise LoweringError(f"precision={after.precision} cannot be held to within={self.within:g}: "
                                        f"{after.why_out}")  # fmt: skip
                raise _breaks_within(after.precision, after.sqnr, least + self.within, self.within)

    def _by_suffix(self, order: Sequence[int]) -> dict[str, Callable[[], Optimized]]:
        """By the suffix of a file, the fastest result that is written to such a file."""
        found: dict[str, Callable[[], Optimized]] = {}
        for place in order:
            for suffix in self._candidates[place].backend.suffixes:
                found.setdefault(suffix, self._candidates[place].make)
        return found


def _breaks_within(precision: str, sqnr: float, best: float, within: float) -> LoweringError:
    return LoweringError(
        f"precision={precision} gives {sqnr:.1f} dB, {best - sqnr:.1f} dB below the {best:.1f} dB of float32, and "
        f"within={within:g} is allowed: give precision=auto, or a larger within"
    )


def _uncompressed_at(run: Run, precision: str, graph: Graph) -> Optimized:
    """The model as it is, computed in another precision. graph: what the engine is to run."""
    return run.at(precision, run.uncompressed(), graph)


def _planned(run: Run, small: Optimized) -> float | None:
    """The SQNR (dB) of the model after the passes that were asked for, before any site is reverted.

    Where it was not measured: infinity for a result of all these passes without a reverted site, since the result's own
    SQNR then sets the bar; None for any other result, which sets no bar.
    """
    assert run.asked is not None  # as there is a result
    known = [found for record in run.asked.passes if (found := _worst(record.agreement)) is not None]
    if known:
        return known[-1]
    return math.inf if _is_whole(run, small) and not small.report.reverted else None


def _is_whole(run: Run, small: Optimized) -> bool:
    """Whether a result is by the passes that were asked for, and not by fewer, as these made it slower."""
    return small.report.pipeline == str(run.pipeline)


def _not_taken() -> Optimized:
    raise AssertionError("a trial is no candidate")


def _worst(agreements: Sequence[Agreement]) -> float | None:
    """The least SQNR among outputs, in dB; None where none was compared."""
    return metrics.worst(one.sqnr for one in agreements) if agreements else None
