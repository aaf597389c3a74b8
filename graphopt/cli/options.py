"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
Verbose = Annotated[
    bool | None,
    typer.Option(
        "--verbose/--quiet",
        help="Say each step on stderr, or nothing. Without either: what runs now, and a line for each stage.",
        show_default=False,
    ),
]
Cpu = Annotated[
    str | None,
    typer.Option(help="The CPU that the result is for, where not this one: avx2, avx512, avx512_vnni, avx512_amx."),
]
Targets = Annotated[
    str,
    typer.Option(
        metavar="NAMES",
        help="What the model will run on; several with commas between them, or fastest, are raced; see `graphopt "
        "targets`.",
    ),
]
Within = Annotated[
    float,
    typer.Option(
        metavar="DB", help="In a race: how far the SQNR may be below the best quantized candidate's, in dB.", min=0.0
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        help="What floats are computed in where a pass rounds: auto (as measured), float32, bfloat16, float16."
    ),
]
Target = Annotated[str, typer.Option(help="What the model will run on; see `graphopt targets`.")]
Calibration = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="Batches for passes that read activations.", show_default=False),
]
Inputs = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Example inputs: the first batch of a SOURCE; of data.npz, all of it.",
        show_default=False,
    ),
]
CalibrationSteps = Annotated[int | None, typer.Option(help="Most calibration batches to use.", min=1)]
Passes = Annotated[
    str | None,
    typer.Option(
        help='As text, such as "prune{neurons=0.5}, quantize", or a preset: '
        "safe, fast or small; see `graphopt passes`. Without it nothing is lost: simplify, and lowering to the target.",
        show_default=False,
    ),
]
CustomOps = Annotated[
    list[Path] | None,
    typer.Option(
        "--custom-ops",
        help="A library of onnxruntime with custom operators of the file; may be given again.",
        show_default=False,
    ),
]
