"""The command line. Exit codes: 0 done, 1 failed, 2 wrong usage; errors are one line on stderr.

Everything heavy is imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import functools
import json
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from graphopt.capture.sources import Captured
    from graphopt.ir.graph import Graph, Value
    from graphopt.pipeline.passes import Pass

app = typer.Typer(
    name="graphopt",
    help="Shrink neural networks: every rewrite is checked, every refusal has its reason.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_trace = False


@app.callback()
def settings(
    trace: Annotated[bool, typer.Option(envvar="GRAPHOPT_TRACE", help="Show the traceback of an error.")] = False,
) -> None:
    global _trace
    _trace = trace


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Add a command to the app; its errors become one line and an exit code."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (typer.Exit, BrokenPipeError):
            raise
        except Exception as error:
            if _trace:
                raise
            from graphopt.errors import UsageError

            if type(error).__module__.startswith("graphopt."):
                line = " ".join(str(error).split())
            else:  # an engine's own error may hold the whole model
                line = f"{type(error).__name__}: {textwrap.shorten(str(error), 300)} (--trace shows where)"
            typer.echo(f"graphopt: {line}", err=True)
            raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None

    app.command()(guarded)
    return guarded


Model = Annotated[Path, typer.Argument(help="An .onnx file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the engine; its own default without it.", min=1)]
Measure = Annotated[
    bool | None,
    typer.Option(
        "--measure/--no-measure",
        help="Time the forms that operators may take, and the result against the input. Done without this too, unless "
        "--cpu or GRAPHOPT_MEASURE=0 say otherwise.",
        show_default=False,
    ),
]
Cpu = Annotated[
    str | None,
    typer.Option(help="The CPU that the result is for, where not this one: avx2, avx512, avx512_vnni."),
]
Target = Annotated[str, typer.Option(help="What the model will run on; see `graphopt targets`.")]
CalibrationSteps = Annotated[int | None, typer.Option(help="Most calibration batches to use.", min=1)]
Passes = Annotated[
    str | None,
    typer.Option(
        help='As text, such as "sparsify{amount=0.5},low-rank{energy=0.95},quantize{scheme=static}"; see '
        "`graphopt passes`. Without it nothing is lost: simplify, and lowering to the target.",
        show_default=False,
    ),
]


@command
def optimize(
    model: Annotated[
        Path,
        typer.Argument(
            help="An .onnx file, or for targets of PyTorch a torch.export archive (.pt2).", show_default=False
        ),
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The file to write.")] = None,
    passes: Passes = None,
    target: Target = "onnxruntime",
    calibration: Annotated[
        Path | None, typer.Option(help="An .npz file: one array an input, samples along axis 0.")
    ] = None,
    calibration_steps: CalibrationSteps = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what each pass would do, and why not; write nothing.")
    ] = False,
    as_json: Json = False,
    threads: Threads = None,
    measure: Measure = None,
    cpu: Cpu = None,
    opset: Annotated[int | None, typer.Option(help="Opset of the file written.", min=1)] = None,
    portable: Annotated[bool, typer.Option("--portable", help="Write standard ONNX operators only.")] = False,
    aot: Annotated[
        bool, typer.Option("--aot", help="Compile an AOTInductor package (.pt2), which PyTorch runs without graphopt.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="An .html file for the report and the graph diff.")] = None,
) -> None:
    """Make a model smaller and faster."""
    from graphopt.api import optimize as run
    from graphopt.errors import UsageError
    from graphopt.pipeline.instruments import Progress
    from graphopt.report import html

    _require_file(model)
    if dry_run and (output or report):
        raise UsageError("--dry-run writes nothing; leave out --output and --report")
    if not dry_run and output is None:
        raise UsageError("say where to write: -o FILE, or --dry-run")
    _require_writable(model, output, report)
    batches = None if calibration is None else _arrays(calibration)
    quiet = as_json or not sys.stderr.isatty()
    small = run(
        model,
        passes,
        target=target,
        calibration=batches,
        calibration_steps=calibration_steps,
        threads=threads,
        measure=measure,
        cpu=cpu,
        instruments=() if quiet else [Progress()],
    )
    written = [] if output is None else [small.export(output, opset=opset, portable=portable, aot=aot)]
    if report is not None:
        html.write(report, small.report, small.diff(), f"{model.name} by graphopt")
        written.append(report)
    if as_json:
        _print_json(small.report.to_dict() | {"written": [str(path) for path in written]})
        return
    _show(small.report)
    typer.echo("\ndry run: nothing was written" if dry_run else f"\nwritten: {', '.join(map(str, written))}")


@command
def sensitivity(
    model: Model,
    setting: Annotated[
        list[str],
        typer.Option(help='A pass to try on each site alone, such as "sparsify{amount=0.5}"; may be given again.'),
    ],
    calibration: Annotated[Path, typer.Option(help="An .npz file: one array an input, samples along axis 0.")],
    calibration_steps: CalibrationSteps = None,
    sites: Annotated[
        list[str] | None,
        typer.Option(help="An op, path or pattern, in place of the settings' own targets; may be given again."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Most batches to compare outputs on; 8 without it.", min=1, show_default=False)
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="A file that keeps what was measured: a later run goes on from there.")
    ] = None,
    target: Target = "onnxruntime",
    as_json: Json = False,
) -> None:
    """Show how much the outputs suffer when one site alone is changed."""
    from graphopt.pipeline.damage import STEPS
    from graphopt.pipeline.instruments import Progress
    from graphopt.sensitivities import sensitivity as measure

    _require_file(model)
    quiet = as_json or not sys.stderr.isatty()
    found = measure(
        model,
        setting,
        calibration=_arrays(calibration),
        calibration_steps=calibration_steps,
        sites=sites or None,
        steps=steps or STEPS,
        cache=cache,
        target=target,
        instruments=() if quiet else [Progress()],
    )
    if as_json:
        _print_json(found.to_dict())
    else:
        _show(found)


def _simplified(captured: Captured) -> Graph:
    from graphopt.passes import REGISTRY
    from graphopt.pipeline.context import Context
    from graphopt.pipeline.text import parse

    return parse("simplify", REGISTRY).apply(captured.graph, Context(feeds=captured.feeds))


@command
def inspect(
    model: Model,
    full: Annotated[bool, typer.Option("--full", help="Print the whole listing.")] = False,
    show_groups: Annotated[bool, typer.Option("--groups", help="List what prune may cut, and what is locked.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a model takes, returns and consists of, as the passes see it."""
    from graphopt.analysis.groups import groups
    from graphopt.capture.sources import capture
    from graphopt.ir.cost import Cost
    from graphopt.ir.ops import OPS
    from graphopt.report import text
    from graphopt.report.declines import Reason
    from graphopt.report.records import count_kinds

    _require_file(model)
    captured = capture(model, "onnx")
    graph, cost = captured.graph, Cost.of(captured.graph)
    if show_groups:  # as prune finds them, behind simplify
        found = groups(_simplified(captured))
        if as_json:
            _print_json([
                {"name": group.name, "kind": group.kind, "size": group.size,
                 "locked": Reason.of(group.locked).to_dict() if group.locked else None}
                for group in found
            ])  # fmt: skip
        else:
            typer.echo(text.groups(found))
        return
    kinds = count_kinds(graph.nodes)
    ops = {kind: number for kind, number in kinds.items() if kind in OPS}
    opaque = {kind: number for kind, number in kinds.items() if kind not in OPS}
    if as_json:
        facts: dict[str, Any] = {
            "inputs": {value.name: _type_text(value) for value in graph.inputs},
            "outputs": {value.name: _type_text(value) for value in graph.outputs},
            "ops": ops,
            "opaque": opaque,
            "parameters": cost.parameters,
            "bytes": cost.bytes,
            "flops": cost.flops,
            "notes": captured.notes,
        }
        _print_json(facts | ({"listing": graph.text().splitlines()} if full else {}))
        return
    lines = [f"input    {value.name} {_type_text(value)}" for value in graph.inputs]
    lines += [f"output   {value.name} {_type_text(value)}" for value in graph.outputs]
    lines.append(f"weights  {text.count(cost.parameters)} parameters, {text.size(cost.bytes)}")
    lines += [] if cost.flops is None else [f"FLOPs    {text.count(cost.flops)}"]
    lines += [f"ops    {text.counts(ops) or 'none'}", f"opaque   {text.counts(opaque) or 'none'}"]
    lines += [f"note     {note}" for note in captured.notes]
    typer.echo("\n".join(lines + ([f"\n{graph.text()}"] if full else [])))


@command
def diff(
    before: Model,
    after: Model,
    full: Annotated[bool, typer.Option("--full", help="Print unchanged lines too.")] = False,
    as_json: Json = False,
) -> None:
    """Show how two models differ, as graphs."""
    from graphopt.report import terminal
    from graphopt.report.diff import GraphDiff

    found = GraphDiff.of(_graph(before), _graph(after))
    context = None if full else 3
    if as_json:
        lines = [line.mark + line.text for line in found.lines if full or line.mark != " "]
        _print_json({"removed": found.removed, "added": found.added, "kinds": found.kinds, "lines": lines})
    elif sys.stdout.isatty():
        _show(terminal.diff(found, context))
    else:
        typer.echo(found.text(context))


@command
def compare(
    before: Model,
    after: Model,
    inputs: Annotated[Path, typer.Option("--data", help="An .npz file: one array an input, samples along axis 0.")],
    sites: Annotated[bool, typer.Option("--sites", help="Show where inside the two go apart, site by site.")] = False,
    steps: Annotated[int | None, typer.Option(help="Most batches to use.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Show how far two models' outputs are apart on the same inputs."""
    from graphopt.comparing import compare as measure

    for path in (before, after):
        _require_file(path)
    found = measure(before, after, _arrays(inputs), steps=steps, sites=sites)
    if as_json:
        _print_json(found.to_dict())
    else:
        _show(found)


@command
def bench(
    model: Model,
    other: Annotated[
        Path | None, typer.Argument(help="A second .onnx file; without it, MODEL optimized.", show_default=False)
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option(help="An .npz file with one batch; made from the input types without it.")
    ] = None,
    passes: Passes = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; below 6 there is no interval.", min=1)] = 15,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time two models in one interleaved run, with the first against itself as control."""
    from graphopt.api import optimize as run
    from graphopt.capture.sources import capture
    from graphopt.errors import UsageError
    from graphopt.measure.machine import environment, header
    from graphopt.measure.timing import paired
    from graphopt.report.records import BenchResult, plain

    for path in filter(None, (model, other)):
        _require_file(path)
    if other is not None and passes is not None:
        raise UsageError("--passes optimizes MODEL, and a second file is given to compare it with; leave out one")
    captured = capture(model, "onnx")
    feeds = captured.feeds[0] if captured.feeds else {}
    if inputs is not None:
        feeds, _ = captured.signature.bind((_arrays(inputs),), {})
    elif not feeds:
        raise UsageError(f"{model} does not run on inputs made from its types: {'; '.join(captured.notes)}")
    baseline = _session(model, threads)
    candidate: Callable[[Mapping[str, Tensor]], list[Tensor]]
    if other is None:
        candidate, name = run(model, passes, threads=threads).runner, "optimized"
    else:
        candidate, name = _session(other, threads), other.name if other.name != model.name else str(other)
        names = {value.name for value in _graph(other).inputs}
        if names != set(feeds):
            raise UsageError(f"the models take different inputs: {', '.join(feeds)} and {', '.join(sorted(names))}")
    ratios = paired(
        {
            model.name: lambda: baseline(feeds),
            name: lambda: candidate(feeds),
            "control": lambda: baseline(feeds),
        },
        baseline=model.name,
        rounds=rounds,
    )
    shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in feeds.items())
    row = {key: ratios[key] for key in (name, "control")}
    machine = environment()
    if as_json:
        _print_json(plain({"environment": machine, "inputs": shapes, "ratios": row}))
    else:
        typer.echo(str(BenchResult(header(machine, threads or int(machine["cores"])), [(shapes, row)])))


@command
def passes(
    name: Annotated[str | None, typer.Argument(help="A pass, to see its options.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the passes, or the options of one."""
    from graphopt.errors import UsageError, nearest
    from graphopt.passes import REGISTRY

    if name is not None and name not in REGISTRY:
        raise UsageError(f"there is no pass {name!r}{nearest(name, list(REGISTRY))}")
    described = [_described(REGISTRY[one]) for one in ([name] if name else REGISTRY)]
    if as_json:
        _print_json(described)
        return
    for facts in described:
        kind = "loses nothing" if facts["lossless"] else "lossy"
        typer.echo(f"{facts['name']}  ({facts['stage']}, {kind}, {' and '.join(facts['dialects'])})")
        typer.echo(textwrap.indent(facts["help"] if name else facts["help"].splitlines()[0], "    "))
        for option, (default, help_) in facts["options"].items():
            typer.echo(f"    {option}={default}" + (f"\n        {help_}" if name else ""))


@command
def targets(as_json: Json = False) -> None:
    """List the targets."""
    from graphopt.backends import TARGETS, target

    found: dict[str, dict[str, Any]] = {}
    for name in TARGETS:
        try:
            backend = target(name)
        except ImportError as error:
            found[name] = {"missing": str(error)}
            continue
        schemes = {op: list(schemes) for op, schemes in backend.schemes.items()}
        found[name] = {"dialect": backend.dialect, "summary": backend.summary, "schemes": schemes}
    if as_json:
        _print_json(found)
        return
    for name, facts in found.items():
        if "missing" in facts:
            typer.echo(f"{name}  (not installed: {facts['missing']})")
            continue
        int8 = ", ".join(f"{op} {' or '.join(schemes)}" for op, schemes in facts["schemes"].items())
        typer.echo(f"{name}  ({facts['dialect']})\n    {facts['summary']}\n    int8: {int8}")


@command
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Forget everything.")] = False,
    latest: Annotated[int, typer.Option(help="How many contests to show, the latest first.", min=1)] = 20,
    as_json: Json = False,
) -> None:
    """Show what was measured on this machine, and where that is kept."""
    from graphopt.measure.cache import opened
    from graphopt.report import text

    kept = opened()
    if clear:
        number = kept.clear()
        typer.echo(f"{number} {'entry' if number == 1 else 'entries'} forgotten, of {kept.path}")
        return
    entries = kept.entries()
    in_bytes = kept.path.stat().st_size if kept.path.is_file() else 0
    if as_json:
        from graphopt.report.records import plain

        contests = [key | value for key, value in entries[:latest]]
        _print_json(plain({"path": kept.path, "entries": len(entries), "bytes": in_bytes, "latest": contests}))
        return
    typer.echo(f"{kept.path}: {text.count(len(entries))} entries, {text.size(in_bytes)}")
    if entries:
        typer.echo("\n" + text.table(text.contest_rows(entries[:latest])))


@command
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="A folder for what it writes.")] = Path("demo-output"),
) -> None:
    """Optimize a sentence encoder with its real weights, verify and time it."""
    from graphopt.cli.demo import main as run

    run(output)


@command
def reproduce(
    folder: Annotated[Path, typer.Argument(help="What a failed pass left.", show_default=False)],
) -> None:
    """Run a failed pass again, from the folder that its error names."""
    from graphopt.backends import target
    from graphopt.errors import UsageError
    from graphopt.passes import REGISTRY
    from graphopt.pipeline.calibration import Calibration
    from graphopt.pipeline.context import Context
    from graphopt.pipeline.instruments import Agree, Verify
    from graphopt.pipeline.target import AnyTarget
    from graphopt.pipeline.text import parse

    if not (folder / "pass.json").is_file():
        raise UsageError(f"{folder} is no reproducer: it has no pass.json")
    account = json.loads((folder / "pass.json").read_text(encoding="utf-8"))
    graph = _load_graph(folder / f"graph.{account['dialect']}", account["dialect"])
    feeds, batches = _saved_feeds(folder / "feeds"), _saved_feeds(folder / "calibration")
    context = Context(
        target=target(account["target"]) if account["target"] else AnyTarget(),
        feeds=feeds,
        calibration=Calibration(batches, graph.inputs) if batches else None,
        instruments=[Verify(), Agree(graph, feeds)],
    )
    parse(account["pass"], REGISTRY).apply(graph, context)
    typer.echo(f"{account['pass']} runs without an error now")


def main() -> None:
    """The entry point."""
    app()


# --- reading what the user named -----------------------------------------------------------------------------------


def _require_file(path: Path) -> None:
    from graphopt.errors import UsageError

    if not path.is_file():
        raise UsageError(f"there is no file {path}")


def _require_writable(model: Path, output: Path | None, report: Path | None) -> None:
    """What is written is no folder, nor the model, nor a file of its weights, nor written twice."""
    from graphopt.dialects.onnx.load import external_files
    from graphopt.errors import UsageError

    files = [] if output is None else [output, *(output.with_name(output.name + end) for end in (".json", ".data"))]
    files += [] if report is None else [report]
    for path in files:
        if not path.parent.is_dir():
            raise UsageError(f"there is no folder {path.parent} to write {path.name} into")
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name a file")
        if path.resolve() == model.resolve():
            raise UsageError(f"{path} is the model itself; write to another file")
    if report is not None and report.resolve() in [path.resolve() for path in files[:-1]]:
        raise UsageError(f"{report} is what --output writes; write the report to another file")
    there = [path for path in files if path.exists()]
    weights = {path.resolve() for path in external_files(model)} if there and model.suffix != ".pt2" else set()
    for path in there:
        if path.resolve() in weights:
            raise UsageError(f"{path} holds weights of the model; write to another file")


def _graph(path: Path) -> Graph:
    from graphopt.capture.sources import capture

    _require_file(path)
    return capture(path, "onnx").graph


def _session(path: Path, threads: int | None) -> Callable[[Mapping[str, Tensor]], list[Tensor]]:
    """The file as it is, in ONNX Runtime at its default options."""
    from graphopt.dialects.onnx import run as onnx_run
    from graphopt.dialects.onnx.load import read_model

    session = onnx_run.session(read_model(path), level="all", threads=threads)
    return functools.partial(onnx_run.run, session)


def _arrays(path: Path) -> dict[str, Any]:
    """The arrays of an .npz file. Pickled objects are refused: they can run code."""
    import zipfile

    import numpy as np

    from graphopt.errors import UsageError

    _require_file(path)
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not an .npz file of plain arrays: {error}") from error


def _load_graph(path: Path, dialect: str) -> Graph:
    if dialect == "fx":
        from graphopt.dialects.fx.graph import FxGraph

        return FxGraph.load(path)
    from graphopt.dialects.onnx.graph import OnnxGraph

    return OnnxGraph.load(path)


def _saved_feeds(folder: Path) -> list[dict[str, Tensor]]:
    from safetensors.torch import load_file

    return [load_file(file) for file in sorted(folder.glob("*.safetensors"))]


# --- showing -------------------------------------------------------------------------------------------------------


def _show(what: Any) -> None:
    """In tables and colours on a terminal, as plain text elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(what)
    else:
        typer.echo(str(what))


def _print_json(facts: Any) -> None:
    typer.echo(json.dumps(facts, indent=2))


def _type_text(value: Value) -> str:
    shape = "[?]" if value.shape is None else "[" + ", ".join(str(size) for size in value.shape) + "]"
    return f"{shape} {str(value.dtype).removeprefix('torch.')}"


def _described(cls: type[Pass]) -> dict[str, Any]:
    """What a pass says of itself: its docstring, and each option with its default and the docstring under it."""
    from dataclasses import MISSING, fields
    from inspect import cleandoc

    from graphopt.pipeline.spelling import value_text

    helps = _option_docs(cls)
    options = {
        field.name: ("required" if field.default is MISSING else value_text(field.default), helps.get(field.name, ""))
        for field in fields(cls)
    }
    return {
        "name": cls.name,
        "stage": cls.stage.name,
        "lossless": cls.lossless,
        "dialects": cls.dialects,
        "help": cleandoc(cls.__doc__ or ""),
        "options": options,
    }


def _option_docs(cls: type[Pass]) -> dict[str, str]:
    """The string that stands under each field in the source."""
    import ast
    from inspect import getsource
    from itertools import pairwise

    body = ast.parse(textwrap.dedent(getsource(cls))).body[0].body  # type: ignore[attr-defined]  # a ClassDef
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    }  # fmt: skip


if __name__ == "__main__":
    main()
