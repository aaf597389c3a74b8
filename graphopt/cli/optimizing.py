"""The commands that make models: optimize, and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt.cli.options import (
    Calibration,
    CalibrationSteps,
    Cpu,
    CustomOps,
    Inputs,
    Json,
    Measure,
    Passes,
    Precision,
    Targets,
    Threads,
    Verbose,
    Within,
)
from graphopt.cli.printing import logged, print_json, show
from graphopt.cli.reading import require_file, require_writable
from graphopt.cli.sources import batches, example, function
from graphopt.errors import UsageError


def optimize(
    model: Annotated[
        Path,
        typer.Argument(
            help="An .onnx file, a torch.export archive (.pt2, for targets of PyTorch), or a Hugging Face folder, "
            "which needs --inputs or --calibration.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file to write; of tensorflow a folder.")
    ] = None,
    passes: Passes = None,
    target: Targets = "onnxruntime",
    within: Within = 3.0,
    precision: Precision = "auto",
    inputs: Inputs = None,
    calibration: Calibration = None,
    calibration_steps: CalibrationSteps = None,
    training: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Batches for passes that train, with labels where the loss needs them; a file is shuffled once.",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="A file of the model to learn from, where it is not MODEL.", show_default=False)
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A folder that keeps the state of training, which goes on from there.", show_default=False),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="FUNCTION",
            help="script.py:function, from a model that is called like the original to how good it is.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what each pass would do, and why not; write nothing.")
    ] = False,
    as_json: Json = False,
    threads: Threads = None,
    measure: Measure = None,
    cpu: Cpu = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="AXES",
            help="How training is spread over the processes of torchrun: dp=2, fsdp=2, tp=2, pp=2, or dp=2,tp=2.",
            show_default=False,
        ),
    ] = None,
    custom_ops: CustomOps = None,
    opset: Annotated[int | None, typer.Option(help="Opset of the file written.", min=1)] = None,
    portable: Annotated[bool, typer.Option("--portable", help="Write standard ONNX operators only.")] = False,
    aot: Annotated[
        bool, typer.Option("--aot", help="Compile an AOTInductor package (.pt2), which PyTorch runs without graphopt.")
    ] = False,
    bundle: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A folder to deploy, with the model, its tokenizer and golden inputs; see `graphopt bundle`.",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="A file for the report: .html, with the graph diff, or .txt or .json.")
    ] = None,
    verbose: Verbose = None,
) -> None:
    """Make a model smaller and faster."""
    from graphopt.api import optimize as run
    from graphopt.capture.folders import opened
    from graphopt.racing.engines import engines
    from graphopt.report.records import require_report_name

    if not model.is_dir():
        require_file(model)
    if dry_run and (output or report or bundle):
        raise UsageError("--dry-run writes nothing; leave out --output, --bundle and --report")
    if not dry_run and output is None and bundle is None:
        raise UsageError("say where to write: -o FILE, --bundle DIR, or --dry-run")
    asked = () if output is None or aot else engines(target, cpu, precision).backends
    of_folder = (asked[0].folder_mark, asked[0].folder_files) if len(asked) == 1 else ("", ())
    require_writable(model, output, report, *of_folder)
    if report is not None:
        require_report_name(report)
    if output is not None and asked and not any(output.suffix in one.suffixes for one in asked):
        asked[0].require_suffix(output)
    if teacher is not None:
        require_file(teacher)
    if checkpoint is not None and checkpoint.exists() and not checkpoint.is_dir():
        raise UsageError(f"{checkpoint} is a file; name a folder for the checkpoints")
    source = opened(model)
    given: dict[str, Any] = {
        "calibration": None if calibration is None else batches(calibration),
        "training": None if training is None else batches(training, shuffle=True),
        "evaluate": None if evaluate is None else function(evaluate),
        "teacher": teacher,
        "checkpoint": checkpoint,
        "example_inputs": None if inputs is None else example(inputs, source),
    }
    with logged(verbose) as shown:
        small = run(
            source,
            passes,
            target=target,
            within=within,
            precision=precision,
            calibration_steps=calibration_steps,
            threads=threads,
            measure=measure,
            cpu=cpu,
            mesh=mesh,
            custom_ops=custom_ops or (),
            verbose=shown,
            **{option: value for option, value in given.items() if value is not None},
        )
    if not small.leads:  # rank 0 writes and reports
        return
    written = [] if output is None else [small.export(output, opset=opset, portable=portable, aot=aot)]
    if bundle is not None:
        written.append(small.bundle(bundle))
    if report is not None:
        small.report.save(report, small.diff())
        written.append(report)
    if as_json:
        print_json(small.report.to_dict() | {"written": [str(path) for path in written]})
        return
    show(small.report)
    typer.echo("\ndry run: nothing was written" if dry_run else f"\nwritten: {', '.join(map(str, written))}")


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="A folder for what it writes.")] = Path("demo-output"),
    distill: Annotated[
        bool, typer.Option("--distill", help="Prune and distil it instead; under torchrun, in several processes.")
    ] = False,
) -> None:
    """Optimize a sentence encoder with its real weights, verify and time it."""
    from graphopt.cli.demo import distil, main

    distil(output) if distill else main(output)
