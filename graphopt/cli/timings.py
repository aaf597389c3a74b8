"""The commands about speed: bench, and the cache of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.options import Calibration, CustomOps, Inputs, Json, Passes, Threads, Verbose
from graphopt.cli.printing import logged, print_json
from graphopt.cli.reading import graph_of, require_file, session_of
from graphopt.cli.sources import batches, example
from graphopt.errors import LoweringError, UsageError, outer_door

if TYPE_CHECKING:
    from torch import Tensor


def bench(
    target: Annotated[
        str, typer.Argument(metavar="MODEL", help="An .onnx file, or the URL of a server.", show_default=False)
    ],
    other: Annotated[
        Path | None, typer.Argument(help="A second .onnx file; without it, MODEL optimized.", show_default=False)
    ] = None,
    inputs: Inputs = None,
    passes: Passes = None,
    calibration: Calibration = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; below 6 there is no interval.", min=1)] = 15,
    threads: Threads = None,
    custom_ops: CustomOps = None,
    clients: Annotated[
        int | None, typer.Option(help="Of a server: clients at once; 32 without it.", min=1, show_default=False)
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Of a server: how long; 10 without it.", min=0.1, show_default=False)
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Of a server: the bundle with the golden set, where it hands out none.", show_default=False),
    ] = None,
    token: Annotated[str | None, typer.Option(help="Of a server: what it wants.", show_default=False)] = None,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Time two models in one interleaved run, with the first against itself as control; or a server under load.

    Inputs are those of --inputs, else the first batch of --calibration, else made from the types that the model
    declares. A server is sent the golden inputs of its bundle, and each answer is compared with the golden one.
    """
    of_servers = {"--clients": clients, "--seconds": seconds, "--bundle": bundle, "--token": token}
    of_models = {"OTHER": other, "--inputs": inputs, "--passes": passes, "--calibration": calibration,
                 "--threads": threads, "--custom-ops": custom_ops}  # fmt: skip
    is_url = target.startswith(("http://", "https://"))
    for option, value in (of_models if is_url else of_servers).items():
        if value is not None:
            raise UsageError(f"{option} is for {'models' if is_url else 'servers'}, and {target} is none: leave it out")
    if is_url:
        _bench_server(target, of_servers, as_json)
        return
    model = Path(target)
    from graphopt.api import optimize as run
    from graphopt.capture.sources import capture
    from graphopt.dialects.adapter import adapter
    from graphopt.ir.graph import shapes_text
    from graphopt.measure.machine import environment, header
    from graphopt.measure.timing import paired
    from graphopt.pipeline.examples import first_batch
    from graphopt.pipeline.instruments import display, watched
    from graphopt.report.records import BenchResult, plain

    for path in filter(None, (model, other)):
        require_file(path)
    for option, value in (("--passes", passes), ("--calibration", calibration)):
        if other is not None and value is not None:
            raise UsageError(f"{option} is for optimizing MODEL, and a second file is given instead; leave out one")
    adapter("onnx").register(custom_ops or ())
    given = None if calibration is None else batches(calibration)
    feeds: Mapping[str, Tensor]
    if inputs is not None:
        feeds = example(inputs, model)
    elif given is not None:
        feeds = first_batch(model, given)
    else:
        captured = capture(model, "onnx")
        if not captured.feeds:
            raise UsageError(f"{model} does not run on inputs made from its types: {'; '.join(captured.notes)}")
        feeds = captured.feeds[0]
    first = session_of(model, threads)
    second: Callable[[Mapping[str, Tensor]], list[Tensor]]
    if other is None:
        with logged(verbose) as shown:
            small = run(model, passes, threads=threads, example_inputs=feeds, calibration=given, verbose=shown)
        second, name = small.runner, "optimized"
    else:
        _require_inputs(other, set(feeds))
        second, name = session_of(other, threads), other.name if other.name != model.name else str(other)
    calls = {model.name: first, name: second, "control": first}
    with (
        outer_door(LoweringError, f"{shapes_text(feeds)}: one of the models does not run on that"),
        logged(verbose) as shown,
        watched(display(shown), "measure", rounds) as advance,
    ):
        timed = {key: partial(call, feeds) for key, call in calls.items()}
        ratios = paired(timed, baseline=model.name, rounds=rounds, on_round=advance)
    row = {key: ratios[key] for key in (name, "control")}
    machine = environment()
    if as_json:
        print_json(plain({"environment": machine, "inputs": shapes_text(feeds), "ratios": row}))
    else:
        typer.echo(str(BenchResult(header(machine, threads or int(machine["cores"])), [(shapes_text(feeds), row)])))


def _bench_server(url: str, options: Mapping[str, Any], as_json: bool) -> None:
    from graphopt.serving.load import load

    given = {name.removeprefix("--"): value for name, value in options.items() if value is not None}
    found = load(url, **given)
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(str(found))


def _require_inputs(path: Path, names: set[str]) -> None:
    """Raise UsageError where a model takes other inputs."""
    takes = {value.name for value in graph_of(path).inputs}
    if takes != names:
        raise UsageError(f"the models take different inputs: {', '.join(sorted(names))} and {', '.join(sorted(takes))}")


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Forget everything.")] = False,
    latest: Annotated[int, typer.Option(help="How many measurements to show, the latest first.", min=1)] = 20,
    as_json: Json = False,
) -> None:
    """Show what was measured on this machine, and where that is kept."""
    from graphopt.measure.cache import opened
    from graphopt.report import figures, tables, text

    kept = opened()
    if clear:
        number = kept.clear()
        if as_json:
            print_json({"path": str(kept.path), "forgotten": number})
            return
        typer.echo(f"{number} {'entry' if number == 1 else 'entries'} forgotten, of {kept.path}")
        return
    entries = kept.entries()
    in_bytes = kept.path.stat().st_size if kept.path.is_file() else 0
    if as_json:
        from graphopt.report.records import plain

        measurements = [key | value for key, value in entries[:latest]]
        print_json(plain({"path": kept.path, "entries": len(entries), "bytes": in_bytes, "latest": measurements}))
        return
    typer.echo(f"{kept.path}: {figures.count(len(entries))} entries, {figures.size(in_bytes)}")
    if entries:
        typer.echo("\n" + text.table(tables.measurement_rows(entries[:latest])))
