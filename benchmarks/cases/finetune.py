"""MiniLM pruned, split and in int8 through a target of PyTorch in one call, then trained further and exported again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graphopt
from benchmarks import sentences
from benchmarks.case import Settings, checked, table
from benchmarks.cases.minilm import calibration
from benchmarks.models import Batch, minilm
from benchmarks.networks import SHAPES
from graphopt.measure.timing import geometric_mean, paired
from graphopt.report import terminal

PASSES = "prune{flops=0.7},low-rank{params=0.9},quantize{scheme=static}"
STEPS, PAIRS, RATE = 20, 32, 2e-5
TARGET = "fbgemm"


def run(settings: Settings) -> bool:
    tokens, train, dev = sentences.tokenizer(), settings.required("stsb", "sts-train.csv"), settings.required(
        "stsb", "sts-dev.csv")  # fmt: skip
    model, batches = minilm(), calibration(settings, tokens)
    examples = [sentences.filled(tokens, *shape) for shape in SHAPES]
    options: dict[str, Any] = {"target": TARGET, "example_inputs": examples, "threads": settings.threads}
    small = graphopt.optimize(model, PASSES, calibration=batches, measure=False, **options)
    settings.console.print(terminal.report(small.report))
    module: Any = small.module
    losses = further(module.train(), sentences.read_pairs(train), tokens)
    module.eval()
    two = {name: torch.cat([tensor, tensor]) for name, tensor in examples[0].items()}
    axes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in two}
    program = torch.export.export(module, (), two, dynamic_shapes=axes)
    again = graphopt.optimize(program, measure=False, **options)
    pairs = sentences.read_pairs(dev)
    texts = sentences.batches(tokens, [*pairs.first, *pairs.second])

    def score(call: Callable[..., Any]) -> float:
        with torch.inference_mode():
            embedded = torch.cat([embed(call, batch) for batch in texts])
        return sentences.spearman(pairs, *embedded.chunk(2))

    with tempfile.TemporaryDirectory() as folder:
        archive = again.export(Path(folder) / "trained.pt2")
        positional: Any = torch.export.load(archive).module()

        def loaded(**batch: Tensor) -> Any:  # an archive takes tensors in order
            return positional(*batch.values())

        package = again.export(Path(folder) / "package.pt2", aot=True)
        compiled = torch._inductor.aoti_load_package(str(package))
        runs: dict[str, tuple[Callable[..., Any], Path | None]] = {
            "fp32": (model, None), "one call": (small, None), "its module": (small.folded.module(), None),
            f"after {STEPS} steps": (module, None), "optimized again": (again, None), "its archive": (loaded, archive),
            "its package": (compiled, package),
        }  # fmt: skip
        rows = table(f"{PASSES}: {losses[0]:.4f} to {losses[-1]:.4f} in {STEPS} steps", "", "Spearman on dev", "MB")
        scores = {}
        for name, (call, file) in runs.items():
            scores[name] = score(call)
            rows.add_row(name, f"{scores[name]:.2f}", "" if file is None else f"{file.stat().st_size / 1e6:.1f}")
        settings.console.print(rows, speeds(model, {"one call": small, "its package": compiled}, examples, settings))
    same = abs(scores["optimized again"] - scores[f"after {STEPS} steps"]) <= 0.1
    text = f"int8 linears: {small.report.ops_after['linear_int8']}, again {again.report.ops_after['linear_int8']}"
    found = small.report.ops_after["linear_int8"] == again.report.ops_after["linear_int8"]
    settings.console.print(checked(text, found), checked("trained, then optimized again: the same", same))
    return found and same


def further(module: torch.nn.Module, pairs: sentences.Pairs, tokens: Any) -> list[float]:
    """Train on the mean squared error of cosines to the scores of STS-B, of 0 to 1; the loss of each step."""
    optimizer = torch.optim.AdamW(module.parameters(), RATE)
    losses = []
    order = torch.randperm(len(pairs.scores), generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(STEPS):
        chosen = order[step * PAIRS : (step + 1) * PAIRS]
        first, second = (
            embed(module, sentences.batches(tokens, [side[index] for index in chosen], PAIRS)[0])
            for side in (pairs.first, pairs.second)
        )
        scores = torch.tensor([pairs.scores[index] / 5 for index in chosen])
        loss = torch.nn.functional.mse_loss((first * second).sum(-1), scores)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def embed(call: Callable[..., Any], batch: Batch) -> Tensor:
    return sentences.pooled(call(**batch)["last_hidden_state"], batch["attention_mask"])


def speeds(model: Any, calls: dict[str, Any], examples: Sequence[Batch], settings: Settings) -> Any:
    rows = table("times as fast as PyTorch eager in fp32", "", *(f"{b}x{n}" for b, n in SHAPES), "geometric mean")

    def inference(call: Any, batch: Batch) -> None:
        with torch.inference_mode():
            call(**batch)

    found = [
        paired({name: partial(inference, call, batch) for name, call in ({"eager": model} | calls).items()},
               baseline="eager", rounds=settings.rounds)
        for batch in examples
    ]  # fmt: skip
    for name in calls:
        ratios = [one[name] for one in found]
        cells = [f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" for ratio in ratios]
        rows.add_row(name, *cells, f"{geometric_mean(ratio.median for ratio in ratios):.2f}")
    return rows
