"""A pass and a target in a package of your own, found through entry points: the folder own_package.

    python examples/use_own_package.py

The package is installed into the folder of --out, and graphopt finds it there: `clip-weights` is a pass of it, and
`float-convs` a target.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from frame import Deployed, Out, Size, Summary, file_size, folder, program

import graphopt
from graphopt.report import figures

PACKAGE = Path(__file__).parent / "own_package"


def written(path: Path, width: int) -> Path:
    """A classifier with a few weights that are far larger than the others, which makes the steps of int8 coarse."""
    draw = np.random.default_rng(0)
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 20]>
        net (float[N, 3, 16, 16] image) => (float[N, 10] scores) {
            a = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (image, k)
            b = Relu(a)
            c = Flatten(b)
            d = MatMul(c, V)
            e = Relu(d)
            scores = MatMul(e, W)
        }""")
    for name, shape in {"k": (8, 3, 3, 3), "V": (512, width), "W": (width, 10)}.items():
        weight = draw.normal(size=shape).astype(np.float32) / np.sqrt(np.prod(shape[1:] if name == "k" else shape[:1]))
        weight.flat[:: weight.size // 4] = 0.5
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), name))
    onnx.save(model, path)
    return path


def main(size: Size = "full", out: Out = Path("out/use_own_package")) -> None:
    """Install the package, list its pass, and optimize a file with its pass for its target."""
    out, summary = folder(out), Summary()
    model, small = written(out / "wild.onnx", 1024 if size == "full" else 16), out / "model.onnx"
    site = out / "site"
    path = os.pathsep.join([str(site.resolve()), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}

    def shell(*command: object) -> None:
        shown = " ".join(map(str, command))
        print(f"$ {shown}", flush=True)
        line = [sys.executable, "-m", *map(str, command)]
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if "error" in line.lower()]
            raise graphopt.UsageError(f"{shown} failed: {next(reversed(lines), done.returncode)}")

    shutil.copytree(PACKAGE, out / "source", dirs_exist_ok=True)  # pip builds in the folder
    options = "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--upgrade", "--target", site
    shell("pip", "install", *options, out / "source")
    shell("graphopt", "passes", "clip-weights")
    passes = "clip-weights{limit=0.2},quantize{scheme=dynamic}"
    shell("graphopt", "optimize", model, "-o", small, "--passes", passes, "--target", "float-convs", "--quiet")

    batch = np.random.default_rng(1).normal(size=(8, 3, 16, 16)).astype(np.float32)
    print(graphopt.compare(model, small, [{"image": batch}]))
    kinds = {node.op_type for node in onnx.load(small).graph.node}
    assert "Conv" in kinds and "QLinearConv" not in kinds, "the target was not asked"
    assert Deployed(small).outputs == ["scores"]
    summary["size"] = f"{figures.size(file_size(model))} -> {figures.size(file_size(small))}"
    if size == "full":
        shell("graphopt", "bench", model, small, "--quiet")
    summary["file"] = str(small)
    summary.show()


if __name__ == "__main__":
    program(main)
