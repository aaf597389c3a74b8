"""The commands about bundles: bundle, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.options import Json, Measure, Threads
from graphopt.cli.printing import print_json
from graphopt.cli.reading import require_file
from graphopt.cli.sources import batches
from graphopt.errors import UsageError

Folder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder of a bundle.", show_default=False)]


def bundle(
    model: Annotated[
        Path,
        typer.Argument(help="An .onnx file, which is taken as it is; with --for a bundle.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.", show_default=False)],
    name: Annotated[
        str | None, typer.Option(help="What servers call the model; the folder's name without it.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A folder with tokenizer.json.", show_default=False)
    ] = None,
    inputs: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Batches for the golden set.", show_default=False)
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The .onnx file that MODEL was made of, for golden outputs.", show_default=False)
    ] = None,
    code: Annotated[
        str | None,
        typer.Option(help="An entry point of the group graphopt.serving, for inputs and answers.", show_default=False),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="From a bundle, write what another server reads: triton, openvino, tensorflow, kserve, ray or docker.",
            show_default=False,
        ),
    ] = None,
    threads: Threads = None,
    measure: Measure = None,
    as_json: Json = False,
) -> None:
    """Put a model into a folder that can be deployed, and that checks itself."""
    if kind is not None or model.is_dir():
        made = {"--name": name, "--tokenizer": tokenizer, "--inputs": inputs, "--reference": reference, "--code": code,
                "--threads": threads, "--measure": measure}  # fmt: skip
        _write_repository(model, output, kind, [option for option, value in made.items() if value is not None])
        return
    from graphopt.serving.making import bundle as make
    from graphopt.serving.verifying import verify as check

    for path in filter(None, (model, reference)):
        require_file(path)
    make(
        model,
        output,
        name=name,
        tokenizer=tokenizer,
        code=code,
        inputs=None if inputs is None else batches(inputs),
        reference=reference,
        threads=threads,
        measure=measure,
    )
    found = check(output)
    if as_json:
        print_json(found.to_dict() | {"written": [str(output)]})
    else:
        typer.echo(f"{found}\nwritten: {output}")


def _write_repository(bundle: Path, output: Path, kind: str | None, others: list[str]) -> None:
    """others: options of a bundle that is made, which have no meaning here."""
    from graphopt.serving.repositories import KINDS, repository

    if kind is None:
        raise UsageError(f"{bundle} is a folder: give an .onnx file, or --for {', '.join(KINDS)} with a bundle")
    if others:
        raise UsageError(f"{others[0]} is for making a bundle, and {bundle} is one: leave it out")
    typer.echo(f"written: {repository(bundle, output, kind)}")


def verify(folder: Folder, threads: Threads = None, as_json: Json = False) -> None:
    """Check a bundle's hashes, and replay its golden inputs on this machine."""
    from graphopt.serving.verifying import verify as check

    found = check(folder, threads=threads)
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(str(found))
