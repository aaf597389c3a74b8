"""The command that serves bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.options import Threads


def serve(
    folder: Annotated[
        Path,
        typer.Argument(metavar="BUNDLE", help="A bundle, or a folder of NAME/VERSION/ bundles.", show_default=False),
    ],
    host: Annotated[str, typer.Option(help="Another one than loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.", min=0, max=65535)] = 8000,
    threads: Threads = None,
    workers: Annotated[int, typer.Option(help="Processes, each with its own models.", min=1)] = 1,
    at_once: Annotated[
        int | None,
        typer.Option(help="Runs of a model at the same time; one for each core without it.", min=1, show_default=False),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(envvar="GRAPHOPT_TOKEN", help="What clients must send as a bearer token.", show_default=False),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(help="An origin whose pages may call from a browser; may be given again.", show_default=False),
    ] = None,
    allow_batch_variance: Annotated[
        bool,
        typer.Option("--allow-batch-variance", help="Batch also where an answer depends on its neighbours."),
    ] = False,
    max_bytes: Annotated[int, typer.Option(help="Of a body, also after decompression.", min=1)] = 64 << 20,
    max_queue: Annotated[int, typer.Option(help="Requests of a model that wait.", min=1)] = 256,
    max_tokens: Annotated[int, typer.Option(help="Rows times tokens of a request.", min=1)] = 65536,
    timeout: Annotated[float, typer.Option(help="Seconds from a request to its answer.", min=0.001)] = 30.0,
    body_timeout: Annotated[float, typer.Option(help="Seconds until a body must have come.", min=0.001)] = 10.0,
    reload_every: Annotated[float, typer.Option(help="Seconds between looks at the folder; 0: never.", min=0)] = 2.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No line for each request.")] = False,
) -> None:
    """Serve bundles over HTTP, on this machine."""
    from graphopt.serving.app import Settings
    from graphopt.serving.server import log_lines
    from graphopt.serving.server import serve as run

    log_lines(of_requests=not quiet)
    settings = Settings(
        folder=folder,
        threads=threads,
        at_once=at_once,
        token=token,
        cors=tuple(cors or ()),
        max_bytes=max_bytes,
        max_queue=max_queue,
        max_tokens=max_tokens,
        timeout=timeout,
        body_timeout=body_timeout,
        reload_every=reload_every,
        allow_batch_variance=allow_batch_variance,
    )
    run(settings, host=host, port=port, workers=workers)
