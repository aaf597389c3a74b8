"""Run the cases: `python -m benchmarks.run [CASE ...]`. The exit code is 1 where a case falls short of its bounds."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.case import DataMissing, Settings

CASES = (
    "minilm", "fidelity", "fbgemm", "scaling", "startup", "architectures", "corpus", "groups", "curves", "pruned",
    "growth", "combined", "quantization", "sweep", "streaming", "calibration", "mixed", "int8", "int4", "float",
    "relower", "openvino", "slowdowns", "frontier", "optimizing", "torch_cpu", "packages", "finetune", "recover",
    "recover_speed", "cuda", "decoding", "serving", "fastest",
)  # fmt: skip

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    cases: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(CASES)}; all without any.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(envvar="GRAPHOPT_DATA", help="Real data and weights; see README.md.", file_okay=False),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of every engine.", min=1)] = 2,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; below 6 there is no interval.", min=1)] = 15,
    medium: Annotated[bool, typer.Option("--medium", help="Architectures of a medium size.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON and plots.", file_okay=False)] = None,
    only: Annotated[list[str] | None, typer.Option(help="Models of a case to run; repeat it for several.")] = None,
    width: Annotated[int | None, typer.Option(help="Columns of the tables; the terminal's without it.")] = None,
) -> None:
    """Measure graphopt, and check what it promises."""
    unknown = [name for name in cases or () if name not in CASES]
    if unknown:
        raise typer.BadParameter(f"there is no case {unknown[0]!r}; there are {', '.join(CASES)}")
    if data is not None and not data.is_dir():
        raise typer.BadParameter(f"there is no folder {data}")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch starts its threads
    os.environ.setdefault("GRAPHOPT_MEASURE", "0")  # cases that are about speed ask for it
    import torch

    from benchmarks.peers import versions
    from graphopt.measure.machine import environment, header

    torch.set_num_threads(threads)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    settings = Settings(data, threads, rounds, medium, Console(width=width, soft_wrap=False), out, tuple(only or ()))
    peers = ", ".join(f"{package} {one}" for package, one in versions().items())
    settings.console.print(header(environment(), threads), f"peers: {peers}", sep="\n", highlight=False)
    failed = []
    for name in cases or CASES:
        settings.console.rule(f"[bold]{name}")
        try:
            if not import_module(f"benchmarks.cases.{name}").run(settings):
                failed.append(name)
        except DataMissing as reason:
            settings.console.print(f"{name} did not run: {reason}", style="yellow")
            if cases:  # asked for by name
                failed.append(name)
    if failed:
        settings.console.print(f"\nshort of a bound: {', '.join(failed)}", style="bold red")
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
