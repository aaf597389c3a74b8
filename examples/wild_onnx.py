"""An ONNX file without its source: look into it, prune it, distil it from itself, quantize it, compare.

    python examples/wild_onnx.py --model wild.onnx --inputs batches.npz

Without a file it is magika's classifier of file types, where GRAPHOPT_DATA names a folder that has it, else a small
file that is written here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from frame import Deployed, Out, Size, Summary, data, folder, program, show

import graphopt
from graphopt.cli.sources import arrays

Batch = dict[str, Any]


def written(path: Path) -> Path:
    """A file as others leave it: opset 13, no names of modules, weights as they came."""
    draw = np.random.default_rng(0)
    shapes = {"a": (16, 3, 3, 3), "b": (32, 16, 3, 3), "c": (32, 10)}
    model = onnx.parser.parse_model("""<ir_version: 7, opset_import: ["": 13]>
        net (float[N, 3, 16, 16] image) => (float[N, 10] scores) {
            x0 = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (image, a)
            x1 = Relu(x0)
            x2 = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x1, b)
            x3 = Relu(x2)
            x4 = GlobalAveragePool(x3)
            x5 = Flatten(x4)
            scores = MatMul(x5, c)
        }""")
    for name, shape in shapes.items():
        weight = draw.normal(size=shape) * (2 / np.prod(shape[1:] or shape)) ** 0.5
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), name))
    onnx.save(model, path)
    return path


def batches(arrays_by_name: Batch, size: int = 32) -> list[Batch]:
    """The rows of arrays, by the names of the inputs, in batches."""
    rows = min(map(len, arrays_by_name.values()))
    return [{name: one[start : start + size] for name, one in arrays_by_name.items()} for start in range(0, rows, size)]


def classes(model: Deployed, test: list[Batch]) -> Any:
    """For each row, the place of the largest entry of the first output."""
    return np.concatenate([next(iter(model(**batch).values())).argmax(-1) for batch in test])


def main(
    size: Size = "full",
    out: Out = Path("out/wild_onnx"),
    model: Annotated[Path | None, typer.Option(help="An .onnx file.")] = None,
    inputs: Annotated[Path | None, typer.Option(help="An .npz file with one array for each input.")] = None,
) -> None:
    """Make a found ONNX file smaller: nothing is needed but inputs like those that it will see."""
    out, summary = folder(out), Summary()
    full = size == "full"
    magika, files = data("onnx_corpus", "magika__standard_v3_3__model.onnx"), data("magika", "val.npz")
    labels: Any = None
    if model is not None:
        if inputs is None:
            raise graphopt.UsageError(f"say what {model} is called with: --inputs FILE.npz, one array for each input")
        rows = arrays(inputs)
    elif full and magika and files:
        model, held = magika, arrays(files)
        rows, labels = {"bytes": held["x"].astype(np.int32)}, held["y"]
    else:
        model = written(out / "wild.onnx")
        rows = {"image": np.random.default_rng(1).normal(size=(2048 if full else 64, 3, 16, 16)).astype(np.float32)}
    every = batches(rows)
    train, test = every[: -len(every) // 2], every[-len(every) // 2 :]

    small = graphopt.optimize(
        model,
        f"prune{{amount=0.3}},distill{{{'epochs=4' if full else 'steps=1'} lr=1e-3}},quantize",
        example_inputs=train[0], training=train, calibration=train,
    )  # fmt: skip
    show(small)
    path = small.export(out / "model.onnx")
    print(graphopt.compare(model, small, test))

    before, after = Deployed(model), Deployed(path)
    if labels is not None:
        right = labels[-sum(len(batch["bytes"]) for batch in test) :]
        shares = [float((classes(one, test) == right).mean()) for one in (before, after)]
        summary["accuracy"] = f"{shares[0]:.1%} -> {shares[1]:.1%}"
    else:
        same = float((classes(before, test) == classes(after, test)).mean())
        summary["accuracy"] = f"the largest output is the same in {same:.1%} of rows"
    summary.model(small, path, size)
    summary.show()


if __name__ == "__main__":
    program(main)
