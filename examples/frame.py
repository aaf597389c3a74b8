"""What all examples share: their options, errors in one line, and the lines that they end with."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch import Tensor

from graphopt import GraphoptError, Optimized, UsageError
from graphopt.errors import outer_door
from graphopt.report import figures

EXAMPLES = (
    "text_classification", "question_answering", "generation", "image_classification", "sentence_embeddings",
    "keyword_spotting", "wild_onnx", "detection", "speech", "encoder_decoder", "use_own_package",
)  # fmt: skip
"""In the order of the gallery in docs/examples.md."""

Size = Annotated[
    Literal["tiny", "full"], typer.Option(help="tiny runs in seconds and learns nothing; full shows what to expect.")
]
Out = Annotated[Path, typer.Option(help="Folder for the files that are made.", file_okay=False)]


def program(main: Callable[..., None]) -> None:
    """Run an example from the command line: an error that the user can cause is one line on stderr."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except GraphoptError as error:
        print(f"{Path(sys.argv[0]).stem}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None


def folder(out: Path) -> Path:
    """The folder for results, made where there is none."""
    with outer_door(UsageError, f"--out {out} cannot be written"):
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(13, "Permission denied")
    return out


def data(*parts: str) -> Path | None:
    """A file of real data in the folder that GRAPHOPT_DATA names; None where there is none."""
    root = os.environ.get("GRAPHOPT_DATA")
    path = Path(root, *parts) if root else None
    return path if path is not None and path.exists() else None


def show(small: Optimized) -> None:
    """Print what the passes did, and which sites stayed as they were, by reason."""
    print(small)
    for record in small.report.passes:
        reasons: dict[str, list[str]] = {}
        for site, reason in record.declined.items():
            reasons.setdefault(str(reason), []).append(site)
        for sentence, sites in reasons.items():
            shown = ", ".join(sites[:3]) + (f" and {len(sites) - 3} more" if len(sites) > 3 else "")
            print(f"{record.name} leaves {shown}: {sentence}")


def file_size(path: Path) -> int:
    """Bytes of a model, with the weights beside it."""
    return sum(one.stat().st_size for one in (path, *path.parent.glob(f"{path.stem}.*.data")))


class Deployed:
    """A file in ONNX Runtime alone: tensors or arrays in by name, tensors out by name."""

    def __init__(self, path: Path) -> None:
        import onnxruntime  # here, as graphopt turns its telemetry off, where it comes first

        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.inputs = [one.name for one in self.session.get_inputs()]
        self.outputs = [one.name for one in self.session.get_outputs()]

    def __call__(self, **batch: Any) -> dict[str, Tensor]:
        results = self.session.run(None, {name: np.asarray(batch[name]) for name in self.inputs})
        return {name: torch.as_tensor(one) for name, one in zip(self.outputs, results, strict=True)}


class Summary:
    """The lines at the end of an example. Time counts from when this is made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.lines: dict[str, str] = {}

    def model(self, small: Optimized, path: Path, size: Size, name: str = "") -> None:
        """The file, its size against the weights before, and its speed against the model before."""
        prefix = f"{name} " if name else ""
        self.lines[f"{prefix}size"] = sizes(small.report.cost_before.bytes, path)
        self.lines[f"{prefix}speed"] = speed(small, size)
        self.lines[f"{prefix}file"] = str(path)

    def __setitem__(self, name: str, text: str) -> None:
        self.lines[name] = text

    def show(self) -> None:
        """Print all lines, and time and peak memory behind them."""
        self.lines["time"] = f"{time.perf_counter() - self.start:.0f} s"
        self.lines["peak memory"] = f"{peak_memory() / 1e9:.2f} GB"
        width = max(map(len, self.lines)) + 2
        print("\n" + "\n".join(f"{name:{width}}{text}" for name, text in self.lines.items()))


def sizes(before: int, path: Path) -> str:
    """The bytes of the weights before, and of the file, which holds the graph too."""
    after = file_size(path)
    times = f"{before / after:.1f} times smaller" if after <= before else f"{after / before:.1f} times larger"
    return f"{figures.size(before)} -> {figures.size(after)}, {times}"


def speed(small: Optimized, size: Size) -> str:
    """How many times as fast as the model before, on the same engine, at each example shape."""
    if size == "tiny":
        return "not measured at size tiny"
    ratios = [one["optimized"] for _, one in small.bench(rounds=9, verbose=False).rows]
    return f"{' and '.join(f'{one.median:.2f}' for one in ratios)} times as fast in {small.report.target}"


def peak_memory() -> int:
    """The most bytes of memory that this process has held."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
