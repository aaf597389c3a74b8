"""The command that runs a failed pass again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.errors import LoweringError, UsageError, outer_door

if TYPE_CHECKING:
    from torch import Tensor



def reproduce(
    folder: Annotated[Path, typer.Argument(help="What a failed pass left.", show_default=False)],
) -> None:
    """Run a failed pass again, from the folder that its error names."""
    from graphopt.backends import target
    from graphopt.dialects.adapter import adapter
    from graphopt.passes import REGISTRY
    from graphopt.pipeline.calibration import Calibration
    from graphopt.pipeline.context import Context
    from graphopt.pipeline.instruments import Agree, Verify
    from graphopt.pipeline.target import AnyTarget
    from graphopt.pipeline.text import parse

    if not (folder / "pass.json").is_file():
        raise UsageError(f"{folder} is no reproducer: it has no pass.json")
    with outer_door(UsageError, f"{folder} is a damaged reproducer"):
        failed = json.loads((folder / "pass.json").read_text(encoding="utf-8"))
        graph = adapter(failed["dialect"]).graph.load(folder / f"graph.{failed['dialect']}")
        feeds, batches = _saved_feeds(folder / "feeds"), _saved_feeds(folder / "calibration")
        backend = target(failed["target"]) if failed["target"] else AnyTarget()
        pipeline = parse(failed["pass"], REGISTRY)
    with outer_door(LoweringError, f"the graph in {folder} does not run"):
        context = Context(
            target=backend,
            feeds=feeds,
            calibration=Calibration(batches, graph.inputs) if batches else None,
            instruments=[Verify(), Agree(graph, feeds)],
        )
        pipeline.apply(graph, context)
    typer.echo(f"{failed['pass']} runs without an error now")


def _saved_feeds(folder: Path) -> list[dict[str, Tensor]]:
    from safetensors.torch import load_file

    return [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
