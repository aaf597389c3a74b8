"""The commands that compare outputs: compare two models, or one with itself changed at one site (sensitivity)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.options import CalibrationSteps, CustomOps, Json, Model, Target, Verbose
from graphopt.cli.printing import logged, print_json, show
from graphopt.cli.reading import require_file
from graphopt.cli.sources import batches


def compare(
    before: Model,
    after: Model,
    inputs: Annotated[str, typer.Option("--data", metavar="SOURCE", help="Batches of inputs.")],
    sites: Annotated[bool, typer.Option("--sites", help="Show where inside the two go apart, site by site.")] = False,
    steps: Annotated[int | None, typer.Option(help="Most batches to use.", min=1)] = None,
    custom_ops: CustomOps = None,
    as_json: Json = False,
) -> None:
    """Show how far two models' outputs are apart on the same inputs."""
    from graphopt.comparing import compare as measure

    for path in (before, after):
        require_file(path)
    found = measure(before, after, batches(inputs), steps=steps, sites=sites, custom_ops=custom_ops or ())
    if as_json:
        print_json(found.to_dict())
    else:
        show(found)


def sensitivity(
    model: Model,
    setting: Annotated[
        list[str],
        typer.Option(help='A pass to try on each site alone, such as "sparsify{amount=0.5}"; may be given again.'),
    ],
    calibration: Annotated[str, typer.Option(metavar="SOURCE", help="Batches of inputs.")],
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
    custom_ops: CustomOps = None,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Show how much the outputs suffer when one site alone is changed."""
    from graphopt.pipeline.damage import STEPS
    from graphopt.sensitivities import sensitivity as measure

    require_file(model)
    with logged(verbose) as shown:
        found = measure(
            model,
            setting,
            calibration=batches(calibration),
            calibration_steps=calibration_steps,
            sites=sites or None,
            steps=steps or STEPS,
            cache=cache,
            target=target,
            custom_ops=custom_ops or (),
            verbose=shown,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        show(found)
