"""Quantizing what is larger than memory: ONNX files shaped like GPT-2 XL (48 layers) and half of it (24).

The files are made here, with seeded weights beside them, written one by one. Each tool quantizes the file in a process
of its own: seconds without imports, and the peak of resident memory (VmHWM, pages of mapped files included). The peers
run under a limit of address space and of time, and a row says how they fail. Static int8 runs the network too, a
section of its layers at a time. Linux only; needs 15 GB of disk, in TMPDIR.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from benchmarks.case import Settings, checked, table

LAYERS = (24, 48)
WIDTH, HEADS, VOCABULARY, POSITIONS = 1600, 25, 50257, 1024
PEAK = 1.5e9
"""Bytes of resident memory that graphopt stays below."""
ADDRESSES, SECONDS = 16 * 2**30, 1200
"""Most bytes of address space, and seconds, that a peer may take."""


def run(settings: Settings) -> bool:
    holds, everything = True, {}
    for layers in LAYERS:
        if not settings.chosen(f"{layers} layers"):
            continue
        with tempfile.TemporaryDirectory(prefix="graphopt-streaming-") as folder:
            source = Path(folder) / "gpt2.onnx"
            parameters = write_gpt2(source, layers, WIDTH, HEADS, VOCABULARY)
            failures: list[str] = []
            rows = table(
                f"GPT-2 of {layers} layers, {parameters / 1e9:.2f} billion parameters, {size(source) / 1e9:.2f} GB",
                "", "seconds", "peak memory GB", "bound", "file GB",
            )  # fmt: skip
            for name, tool in TOOLS.items():
                made = measured(tool.__name__, source, Path(folder) / "to" / "small.onnx", settings.threads)
                everything[f"{layers} layers, {name}"] = asdict(made)
                bounded = tool in BOUNDED
                fits = (not name.startswith("graphopt") or made.failure is None) and (not bounded or made.peak < PEAK)
                peak = checked(f"{made.peak / 1e9:.2f}" if made.peak else "?", fits)
                written = checked("failed" if made.failure else f"{made.bytes / 1e9:.2f}", fits)
                rows.add_row(name, f"{made.seconds:.0f}", peak, f"{PEAK / 1e9:g}" if bounded else "", written)
                if made.failure:
                    failures.append(f"{name}: {made.failure}")
                holds = holds and fits
        settings.console.print(rows)
        for failure in failures:
            settings.console.print(failure, soft_wrap=True)
    if settings.out is not None:
        (settings.out / "streaming.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    return holds


# --- the model -----------------------------------------------------------------------------------------------------


def write_gpt2(path: Path, layers: int, width: int, heads: int, vocabulary: int) -> int:
    """Write a float32 GPT-2 at opset 20, its table of tokens tied with the last MatMul; returns its parameters.

    Weights are stored (in, out), as Conv1D has them: normal, of deviation 0.02, one generator each.
    """
    stored: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    with path.with_name(path.name + ".data").open("wb") as file:

        def weight(name: str, *shape: int, constant: float | None = None) -> str:
            draw = np.random.default_rng(len(stored))
            array = draw.standard_normal(shape, np.float32) if constant is None else np.full(shape, constant, "f4")
            array *= 0.02 if constant is None else 1
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            places = {"location": path.name + ".data", "offset": file.tell(), "length": array.nbytes}
            tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in places.items())
            file.write(array.data)
            stored.append(tensor)
            return name

        def numbers(*several: int) -> str:
            name = f"numbers_{len(stored)}"
            stored.append(helper.make_tensor(name, TensorProto.INT64, [len(several)], several))
            return name

        def op(kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
            names = [f"v{len(nodes)}_{index}" for index in range(outputs)]
            nodes.append(helper.make_node(kind, inputs, names, f"{at}/{kind}_{len(nodes)}", **attributes))
            return names[0]

        def norm(x: str, name: str) -> str:
            scale, bias = weight(f"{name}.weight", width, constant=1), weight(f"{name}.bias", width, constant=0)
            return op("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-5)

        def linear(x: str, name: str, inner: int, outer: int) -> str:
            return op("Add", op("MatMul", x, weight(f"{name}.weight", inner, outer)), weight(f"{name}.bias", outer))

        def split(x: str, perm: tuple[int, ...]) -> str:
            return op("Transpose", op("Reshape", x, numbers(0, 0, heads, width // heads)), perm=perm)

        at = ""
        length = op("Gather", op("Shape", "input_ids"), numbers(1), axis=0)
        tokens, places = weight("wte.weight", vocabulary, width), weight("wpe.weight", POSITIONS, width)
        x = op("Add", op("Gather", tokens, "input_ids"), op("Slice", places, numbers(0), length, numbers(0)))
        square = op("Expand", weight("one", 1, 1, constant=1), op("Concat", length, length, axis=0))
        later = op("Sub", weight("ones", 1, constant=1), op("Trilu", square, upper=0))
        mask = op("Mul", later, weight("lowest", 1, constant=-1e9))
        for layer in range(layers):
            at = f"h.{layer}"
            qkv = linear(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn", width, 3 * width)
            query = op("Split", qkv, outputs=3, axis=-1, num_outputs=3)
            key, value = (query.replace("_0", f"_{index}") for index in (1, 2))
            scores = op("MatMul", split(query, (0, 2, 1, 3)), split(key, (0, 2, 3, 1)))
            scale = weight(f"{at}.scale", 1, constant=(width // heads) ** -0.5)
            weights = op("Softmax", op("Add", op("Mul", scores, scale), mask), axis=-1)
            context = op("Transpose", op("MatMul", weights, split(value, (0, 2, 1, 3))), perm=(0, 2, 1, 3))
            joined = op("Reshape", context, numbers(0, 0, width))
            x = op("Add", x, linear(joined, f"{at}.attn.c_proj", width, width))
            wide = op("Gelu", linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc", width, 4 * width), approximate="tanh")
            x = op("Add", x, linear(wide, f"{at}.mlp.c_proj", 4 * width, width))
        at = "lm_head"
        logits = op("MatMul", norm(x, "ln_f"), op("Transpose", tokens, perm=(1, 0)))
    nodes[-1].output[0] = "logits"
    assert logits != "logits"
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    result = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", vocabulary])
    graph = helper.make_graph(nodes, "gpt2", [ids], [result], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return sum(int(np.prod(tensor.dims)) for tensor in stored if tensor.data_type == TensorProto.FLOAT)


def size(path: Path) -> int:
    """Bytes of a model's file and of the weights beside it."""
    return sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))


# --- the tools -----------------------------------------------------------------------------------------------------


def graphopt_dynamic(source: Path, to: Path) -> None:
    import graphopt

    graphopt.optimize(source, "quantize{scheme=dynamic}").export(to)


def graphopt_int4(source: Path, to: Path) -> None:
    import graphopt

    graphopt.optimize(source, "quantize{scheme=weight-only bits=4 block=32}").export(to)


def graphopt_static(source: Path, to: Path) -> None:
    """With ranges of a few random prompts, which say nothing of accuracy; weights to the nearest, as the peers do."""
    import torch

    import graphopt

    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, VOCABULARY, (1, 64), generator=draw) for _ in range(8)]
    graphopt.optimize(source, "quantize{scheme=static rounding=nearest}", calibration=prompts).export(to)


def quantize_dynamic(source: Path, to: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, to, per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=True)


def matmul_nbits(source: Path, to: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(str(source), bits=4, block_size=32, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(to), use_external_data_format=True)


TOOLS: dict[str, Callable[[Path, Path], None]] = {
    "graphopt, dynamic int8": graphopt_dynamic,
    "onnxruntime, quantize_dynamic": quantize_dynamic,
    "graphopt, int4 in blocks of 32": graphopt_int4,
    "onnxruntime, MatMulNBitsQuantizer": matmul_nbits,
    "graphopt, static int8": graphopt_static,
}
BOUNDED = (graphopt_dynamic, graphopt_int4)
"""Those that are held to PEAK."""


@dataclass(frozen=True)
class Measured:
    """What a tool took until it was done, or failed."""

    seconds: float
    peak: float = 0.0
    """Bytes of resident memory, at most; 0 where they are not known."""
    bytes: int = 0
    """Of what it wrote."""
    failure: str | None = None


def measured(tool: str, source: Path, to: Path, threads: int) -> Measured:
    """Run a tool in a process of its own, into a folder that is emptied after."""
    code = f"from benchmarks.cases.streaming import child; child({tool!r}, {str(source)!r}, {str(to)!r}, {threads})"
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        to = Path(folder) / to.name
        code = f"from benchmarks.cases.streaming import child; child({tool!r}, {str(source)!r}, {str(to)!r}, {threads})"
        try:
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return Measured(SECONDS, failure=f"not done after {SECONDS} s")
        said, errors = done.stdout.strip().splitlines(), done.stderr.strip().splitlines()
        if not said:
            return Measured(0.0, failure=errors[-1] if errors else f"killed by signal {-done.returncode}")
        failure = None if done.returncode == 0 else errors[-1]
        return Measured(**json.loads(said[-1]), bytes=size(to), failure=failure)


def child(tool: str, source: str, to: str, threads: int) -> None:
    """Quantize, and print the figures as the last line, also where it fails."""
    import onnxruntime.quantization  # noqa: F401  # imports are not counted
    import torch

    import graphopt.api  # noqa: F401

    torch.set_num_threads(threads)
    if not tool.startswith("graphopt"):
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    start = time.perf_counter()
    try:
        globals()[tool](Path(source), Path(to))
    finally:
        print(json.dumps({"seconds": time.perf_counter() - start, "peak": _peak()}))


def _peak() -> int:
    """Bytes of this process's resident memory, at most."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
