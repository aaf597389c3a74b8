"""Passes, their order, and their text form: `sparsify{amount=0.5},low-rank{energy=0.95},quantize{scheme=static}`."""

from __future__ import annotations

import difflib
import enum
import fnmatch
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from graphopt.ir.cost import Cost, sizes
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import WORDS
from graphopt.report.records import PassRecord, Report

if TYPE_CHECKING:
    from graphopt.pipeline.calibration import Calibration, S
    from graphopt.pipeline.instruments import Instrument

Loss = Callable[[Any, Any], Tensor]
"""(what the model returns, the batch that it was fed) -> one number, the mean over the batch."""


class UsageError(ValueError):
    """What the user asked for cannot be: an unknown name, a wrong option, a wrong order. Nothing was changed."""


class PassError(RuntimeError):
    """A pass failed. The user's model is untouched.

    pass_name, node (with its module path, "" when unknown) and reproducer (a folder, or None) say where.
    """

    def __init__(self, pass_name: str, reason: str, node: str = "", reproducer: str | None = None) -> None:
        where = f" at {node}" if node else ""
        again = f"; to reproduce: {reproducer}" if reproducer else ""
        super().__init__(f"pass {pass_name} failed{where}: {reason}{again}")
        self.pass_name, self.reason, self.node, self.reproducer = pass_name, reason, node, reproducer


class Stage(enum.IntEnum):
    """Where in a pipeline a pass may stand. SIMPLIFY goes anywhere before LOWER; the rest never goes backwards."""

    SIMPLIFY = 0
    PRUNE = 1
    FACTORIZE = 2
    RECOVER = 3
    QUANTIZE = 4
    LOWER = 5


@dataclass(frozen=True, init=False)
class Selector:
    """Which sites: words (linear), module paths or globs (encoder.layer.*.output), regular expressions (re:...), or
    single nodes by their unique name (node:..., see `of`)."""

    terms: tuple[str, ...]

    def __init__(self, *terms: str | Iterable[str]) -> None:
        flat = [t for term in terms for t in ([term] if isinstance(term, str) else term)]
        object.__setattr__(self, "terms", tuple(flat))

    @classmethod
    def of(cls, *nodes: Node) -> Selector:
        """These nodes and no other: a name may be that of a word, and modules called twice share their path."""
        return cls(f"node:{node.name}" for node in nodes)

    def matches(self, node: Node, term: str) -> bool:
        if term in WORDS:
            return node.kind == term
        if term.startswith("node:"):
            return node.name == term.removeprefix("node:")
        if term.startswith("re:"):
            return re.search(term[3:], node.label) is not None
        return any(fnmatch.fnmatchcase(name, pattern) for name in (node.path, node.name) if name
                   for pattern in (term, term + ".*"))  # fmt: skip

    def __contains__(self, node: Node) -> bool:
        return any(self.matches(node, term) for term in self.terms)

    def __str__(self) -> str:
        return value_text(self.terms[0] if len(self.terms) == 1 else list(self.terms))


@dataclass(frozen=True, init=False)
class PerSite(Mapping[str, Any]):
    """A value for each term of a selector: a site takes that of the first term that matches it."""

    pairs: tuple[tuple[str, Any], ...]

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Raises UsageError where a term is no text."""
        if wrong := [term for term in values if not isinstance(term, str)]:
            raise UsageError(f"{wrong[0]!r} selects no site; give a word, a module path or a pattern")
        object.__setattr__(self, "pairs", tuple(values.items()))

    def __getitem__(self, term: str) -> Any:
        return dict(self.pairs)[term]

    def __iter__(self) -> Iterator[str]:
        return (term for term, _ in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def term_of(self, node: Node) -> str | None:
        """The term whose value a node takes, or None where no term matches it."""
        return next((term for term in self if node in Selector(term)), None)


@dataclass(frozen=True)
class Pass:
    """A rewrite. Subclasses are frozen dataclasses: class-level facts, and fields that are the options.

    Each option has a one-line docstring under it, which is its help. Where the default is a selector, a string or a
    sequence of strings becomes one; a subclass with a `__post_init__` calls this one's first. `run` changes the graph
    through the graph's own methods only, keeps no state on self, and accounts for every site: changed, or declined
    with a reason.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    lossless: ClassVar[bool] = False
    """Whether outputs must stay equal, up to rounding."""
    dialects: ClassVar[tuple[str, ...]] = ("fx", "onnx")

    def __post_init__(self) -> None:
        for option in fields(self):
            given = getattr(self, option.name)
            if isinstance(option.default, Selector) and not isinstance(given, Selector):
                terms = [given] if isinstance(given, str) else given
                if not isinstance(terms, list | tuple) or not all(isinstance(term, str) for term in terms):
                    raise UsageError(f"{self.name}: {option.name} is {given!r}; give words, module paths or patterns")
                object.__setattr__(self, option.name, Selector(*terms))

    def run(self, graph: Graph, context: Context) -> None:
        raise NotImplementedError

    def __str__(self) -> str:
        """The text form: the name and the options that differ from their defaults."""
        options = [
            f"{f.name}={value_text(getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name) != f.default
        ]
        return self.name + ("{" + " ".join(options) + "}" if options else "")


@dataclass
class Context:
    """What a pass may ask of its surroundings while it runs."""

    target: Any = None
    """The backend: `schemes` says which words may be int8, and how."""
    threads: int | None = None
    """Of the engine, where a pass measures; None for its default."""
    report: Report = field(default_factory=Report)
    feeds: Sequence[Mapping[str, Tensor]] = ()
    """The example inputs, by input name, one mapping for each shape."""
    calibration: Calibration | None = None
    loss: Callable[[list[Tensor], Any], Tensor] | None = None
    """(the graph's outputs in order, the batch) -> one number; for criteria that follow gradients."""
    evaluate: Callable[[Graph], float] | None = None
    """A graph -> how good it is, more is better; for goals that are set in the user's own measure."""
    instruments: Sequence[Instrument] = ()
    record: PassRecord = field(default_factory=lambda: PassRecord("", ""))
    """The account of the pass that runs now."""
    current: Pass | None = None
    put_back: Mapping[str, str] = field(default_factory=dict)
    """By label, sites that passes which lose accuracy leave as they are, and why: there they made the model slower."""
    labels: dict[Node, str] = field(default_factory=dict)
    """How the account calls the sites: their label, with the node's name where several share that (a shared module)."""

    def sites(self, graph: Graph, targets: Selector, ignore: Selector = Selector()) -> list[Node]:
        """The nodes that `targets` selects and `ignore` does not, counted as eligible.

        Raises UsageError where a term that the user wrote selects nothing, naming the nearest path.
        """
        nodes = graph.nodes
        options = {f.name: f.default for f in fields(self.current)} if self.current else {}
        values = {name: getattr(self.current, name) for name in options}
        chosen_by_user = [value for name, value in values.items() if value != options[name]]
        for selector in (targets, ignore):
            for term in selector.terms if selector in chosen_by_user else ():
                if not any(selector.matches(node, term) for node in nodes):
                    names = sorted({node.label for node in nodes} | {node.kind for node in nodes if node.word})
                    raise UsageError(f"{term!r} selects no site of the model{nearest(term, names)}")
        chosen = [node for node in nodes if node in targets and node not in ignore]
        often = Counter(node.label for node in chosen)
        for node in chosen:
            self.labels[node] = node.label if often[node.label] == 1 else f"{node.label} ({node.name})"
        self.record.eligible.extend(self.labels[node] for node in chosen)
        return [node for node in chosen if not self.puts_back(self.labels[node])]

    def puts_back(self, label: str) -> bool:
        """Whether a site stays as it is because the model was slower with it changed; it is then declined."""
        if label not in self.put_back or self.current is None or self.current.lossless:
            return False
        self.record.declined[label] = self.put_back[label]
        return True

    def per_site(self, graph: Graph, option: str, values: PerSite, targets: Selector) -> dict[Node, Any]:
        """The value of each site that `targets` selects and a term of `values` matches.

        Raises UsageError where a term gives its value to none of them, naming the nearest path or the terms before it.
        """
        selected = [node for node in graph.nodes if node in targets]
        terms = {node: term for node in selected if (term := values.term_of(node)) is not None}
        for term in values:
            if term in terms.values():
                continue
            if any(node in Selector(term) for node in selected):
                raise UsageError(f"{option}: {term!r} is never reached, as earlier terms match all of its sites")
            names = sorted({node.label for node in selected} | {node.kind for node in selected if node.word})
            raise UsageError(f"{option}: {term!r} selects none of the sites in {targets}{nearest(term, names)}")
        return {node: values[term] for node, term in terms.items()}

    def decline(self, site: Node, reason: str) -> None:
        """Leave a site as it is, and say why."""
        self.record.declined[self.labels.get(site, site.label)] = reason

    def note(self, text: str) -> None:
        """Tell the user something about this pass as a whole."""
        self.record.notes.append(text)

    def statistics(self, graph: Graph, wanted: Iterable[tuple[Value, S]]) -> Iterator[S]:
        """What the calibration batches do to values: each with a fresh statistic to fill, given back in order.

        The graph must stay as it is until the last (`Calibration.observe`). Raises UsageError without calibration.
        """
        return self.batches().observe(graph, wanted)

    def gradients(self, graph: Graph, values: Sequence[Value]) -> Iterator[list[Tensor]]:
        """d loss / d values, batch by batch of the calibration.

        Raises UsageError without calibration or a loss, and where the dialect has no gradients.
        """
        if graph.dialect != "fx":
            raise UsageError(
                f"{self.record.name} follows gradients, and an {graph.dialect} graph has none: use a target that runs "
                "PyTorch graphs (graphopt targets), or a criterion without gradients"
            )
        if self.loss is None:
            raise UsageError(
                f"{self.record.name} follows gradients, and has no loss: pass loss=<function of (outputs, batch)>, or "
                "batches with labels"
            )
        loss = self.loss
        for feeds, batch in self.batches().with_batches():
            yield graph.gradients(feeds, lambda outputs, batch=batch: loss(outputs, batch), values)  # type: ignore[misc]

    def batches(self) -> Calibration:
        """The calibration batches. Raises UsageError where there are none."""
        if self.calibration is None:
            raise UsageError(
                f"{self.record.name} needs calibration data: pass calibration=<batches of inputs> "
                f"(on the command line: --calibration file.npz){self._without_calibration()}"
            )
        return self.calibration

    def _without_calibration(self) -> str:
        scheme = getattr(self.current, "scheme", None)
        return ", or use scheme=dynamic" if scheme is not None else ""

    def cost(self, graph: Graph) -> Cost:
        """What a graph costs at the sizes of the first example."""
        return Cost.of(graph, sizes(graph, self.feeds[0]) if self.feeds else {})


@dataclass(frozen=True)
class Pipeline(Pass):
    """Passes in order; itself a pass, so it nests. Raises UsageError when the stages are out of order."""

    name: ClassVar[str] = "pipeline"
    stage: ClassVar[Stage] = Stage.SIMPLIFY

    passes: tuple[Pass, ...] = ()
    """The passes, first to last."""

    def __init__(self, passes: Iterable[Pass] = ()) -> None:
        object.__setattr__(self, "passes", tuple(passes))
        check_order(self)

    def leaves(self) -> Iterator[Pass]:
        """The passes inside, nested ones opened, repeats once."""
        for inner in self.passes:
            yield from inner.leaves() if isinstance(inner, Pipeline) else [inner]

    def apply(self, graph: Graph, context: Context) -> Graph:
        """Run on a clone and return it: when a pass fails, `graph` is as it was."""
        clone = graph.clone()
        self.run(clone, context)
        return clone

    def run(self, graph: Graph, context: Context) -> None:
        for inner in self.passes:
            inner.run(graph, context) if isinstance(inner, Pipeline) else run_pass(inner, graph, context)

    def __str__(self) -> str:
        return ",".join(f"({p})" if type(p) is Pipeline else str(p) for p in self.passes)


@dataclass(frozen=True, init=False)
class Repeat(Pipeline):
    """Passes again and again, until nothing changes any more or `times` is reached."""

    name: ClassVar[str] = "repeat"

    times: int = 10
    """Most rounds, at least 1."""

    def __init__(self, passes: Iterable[Pass] = (), times: int = 10) -> None:
        super().__init__(passes)
        if not isinstance(times, int) or isinstance(times, bool) or times < 1:
            raise UsageError(f"repeat: times is {times!r}; give a whole number, at least 1")
        object.__setattr__(self, "times", times)
        stages = {leaf.stage for leaf in self.leaves()}
        if times > 1 and len(stages if Stage.LOWER in stages else stages - {Stage.SIMPLIFY}) > 1:
            names = ", ".join(f"{leaf.name} ({leaf.stage.name})" for leaf in self.leaves())
            raise UsageError(f"repeat: the second round of {names} would go back a stage; repeat each stage by itself")

    def run(self, graph: Graph, context: Context) -> None:
        for _ in range(self.times):
            before = graph.version
            super().run(graph, context)
            if graph.version == before:
                return

    def __str__(self) -> str:
        return f"repeat{{times={self.times}}}({super().__str__()})"


def check_order(pipeline: Pipeline) -> None:
    """Raise UsageError when a pass stands after one of a later stage, saying the right order."""
    leaves = list(pipeline.leaves())
    latest: Pass | None = None
    for leaf in leaves:
        late = latest is not None and (
            latest.stage is Stage.LOWER if leaf.stage is Stage.SIMPLIFY else leaf.stage < latest.stage
        )
        if late and leaf.stage is not Stage.LOWER:
            assert latest is not None
            ordered = sorted((p for p in leaves), key=lambda p: p.stage)
            raise UsageError(
                f"{leaf.name} ({leaf.stage.name}) cannot stand after {latest.name} ({latest.stage.name}); "
                f"the right order is {','.join(p.name for p in ordered)}"
            )
        if leaf.stage is not Stage.SIMPLIFY:
            latest = leaf


def run_pass(pass_: Pass, graph: Graph, context: Context) -> None:
    """Run one pass between the instruments' `before` and `after`, and keep its account in the report."""
    if graph.dialect not in pass_.dialects:
        raise UsageError(
            f"{pass_.name} works on {' or '.join(pass_.dialects)} graphs, and this target's dialect is {graph.dialect}"
        )
    record = PassRecord(pass_.name, str(pass_), stage=pass_.stage.name)
    record.cost_before, record.nodes_before = context.cost(graph), len(graph.nodes)
    context.record, context.current, context.labels = record, pass_, {}
    active = [instrument for instrument in context.instruments if instrument.should_run(pass_)]
    for instrument in active:
        instrument.before(pass_, graph, context)
    version, start = graph.version, time.perf_counter()
    try:
        pass_.run(graph, context)
        graph.sweep()
        record.seconds, record.changes = time.perf_counter() - start, graph.version - version
        record.cost_after, record.nodes_after = context.cost(graph), len(graph.nodes)
        for instrument in active:
            instrument.after(pass_, graph, context)
    except UsageError:
        raise
    except Exception as error:
        reproducer: str | None = None
        for instrument in active:
            with suppress(Exception):  # a failing reproducer must not hide the failure
                reproducer = instrument.failed(pass_, graph, context, error) or reproducer
        node = getattr(error, "node", "")
        reason = getattr(error, "reason", None) or f"{type(error).__name__}: {error}"
        raise PassError(pass_.name, reason, node, reproducer) from error
    context.report.passes.append(record)


# --- the text form -------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<word>[^\s{}()\[\],="]+)|(?P<mark>[{}()\[\],=]))""")


def parse(text: str, registry: Mapping[str, Any]) -> Pipeline:
    """The pipeline that `text` describes; `registry` gives the class of each pass by name.

    Raises UsageError on a syntax error (with its position), an unknown pass or option (with the nearest name), and a
    value that the pass refuses. `str(pipeline)` is the inverse.
    """
    return _Parser(text, registry).pipeline()


class _Parser:
    def __init__(self, text: str, registry: Mapping[str, Any]) -> None:
        self.text, self.registry, self.tokens = text, registry, list[tuple[str, str, int]]()
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                raise self.error(position)
            self.tokens.append((str(match.lastgroup), match[str(match.lastgroup)], match.start(str(match.lastgroup))))
            position = match.end()
        self.tokens.append(("end", "", len(text)))

    def error(self, position: int) -> UsageError:
        return UsageError(
            f"pipeline text, at character {position + 1}: cannot read {self.text[position : position + 20]!r} "
            f"in {self.text!r}; the form is name{{option=value ...}},name..."
        )

    def take(self, expected: str) -> str:
        """The next token, which must be of this kind (word, end) or this mark."""
        kind, token, position = self.tokens[0]
        if expected != (token if kind == "mark" else kind):
            raise self.error(position)
        return self.tokens.pop(0)[1]

    def pipeline(self) -> Pipeline:
        passes = self.passes()
        self.take("end")
        return Pipeline(passes)

    def passes(self) -> list[Pass]:
        if self.tokens[0][1] in ("", ")"):
            return []
        passes = [self.one()]
        while self.tokens[0][1] == ",":
            self.take(",")
            passes.append(self.one())
        return passes

    def one(self) -> Pass:
        if self.tokens[0][1] == "(":
            return Pipeline(self.group())
        name = self.take("word")
        options = self.options() if self.tokens[0][1] == "{" else {}
        if name == "repeat":
            return _construct(Repeat, options | {"passes": tuple(self.group())})
        if name not in self.registry:
            raise UsageError(f"there is no pass {name!r}{nearest(name, [*self.registry, 'repeat'])}")
        return _construct(self.registry[name], options)

    def group(self) -> list[Pass]:
        self.take("(")
        passes = self.passes()
        self.take(")")
        return passes

    def options(self, quoted: bool = False) -> dict[str, Any]:
        """What stands in braces; quoted: names may be strings, as the terms of a value by site are."""
        options: dict[str, Any] = {}
        self.take("{")
        while self.tokens[0][1] != "}":
            kind, _, position = self.tokens[0]
            name = str(self.value()) if quoted and kind == "string" else self.take("word")
            if name in options:
                raise UsageError(f"pipeline text, at character {position + 1}: {name} is given twice in {self.text!r}")
            self.take("=")
            options[name] = self.value()
            if self.tokens[0][1] == ",":
                self.take(",")
        self.take("}")
        return options

    def value(self) -> Any:
        """A string, a _Bare word, a tuple of values, or values by term."""
        kind, token, position = self.tokens[0]
        if token == "{":
            return self.options(quoted=True)
        self.tokens.pop(0)
        if token == "[":
            items = []
            while self.tokens[0][1] != "]":
                items.append(self.value())
                if self.tokens[0][1] == ",":
                    self.take(",")
            self.take("]")
            return tuple(items)
        if kind == "string":
            with suppress(ValueError):
                return json.loads(token)
        if kind != "word":
            raise self.error(position)
        return _Bare(token)


class _Bare(str):
    """A value without quotes: a number or a constant where the option isn't a selector (a module may be called 0)."""

    def literal(self) -> Any:
        if self in ("true", "false", "none"):
            return {"true": True, "false": False, "none": None}[self]
        for number in (int, float):
            with suppress(ValueError):
                return number(self)
        return str(self)


def _literal(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_literal(item) for item in value)
    if isinstance(value, dict):
        return PerSite({term: _literal(item) for term, item in value.items()})
    return value.literal() if isinstance(value, _Bare) else value


def _selector(cls: type[Pass], name: str, value: Any) -> Selector:
    terms = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(term, str) for term in terms):
        kind = "a value by site" if isinstance(value, dict) else "a list of lists"
        raise UsageError(f"{cls.name}: {name} is {kind}; give words, module paths or patterns")
    return Selector(*(str(term) for term in terms))


def _construct(cls: type[Pass], options: Mapping[str, Any]) -> Pass:
    known = {f.name: f for f in fields(cls)}
    chosen = {}
    for name, value in options.items():
        if name not in known:
            raise UsageError(f"{cls.name} has no option {name!r}{nearest(name, list(known))}")
        default = known[name].default
        chosen[name] = _selector(cls, name, value) if isinstance(default, Selector) else _literal(value)
    missing = [f.name for f in known.values() if f.default is MISSING and f.name not in chosen and f.init]
    if missing and cls is not Repeat:
        raise UsageError(f"{cls.name} needs {', '.join(missing)}")
    try:
        return cls(**chosen)
    except TypeError as error:
        raise UsageError(f"{cls.name}: {error}") from error


def nearest(name: str, names: Sequence[str]) -> str:
    """ '; did you mean ...', or the whole list where nothing is near and the list is short."""
    close = difflib.get_close_matches(name, names, 1, 0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(sorted(names))}" if len(names) <= 20 else ""


def value_text(value: Any) -> str:
    """A value of an option as the text form has it."""
    if isinstance(value, Selector):
        return str(value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(value_text(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + " ".join(f"{value_text(term)}={value_text(item)}" for term, item in value.items()) + "}"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_.*][^\s{}()\[\],=\"]*", value) and value not in ("true", "false", "none")
        return value if plain and not _is_number(value) else json.dumps(value)
    return repr(value)


def _is_number(text: str) -> bool:
    with suppress(ValueError):
        float(text)
        return True
    return False
