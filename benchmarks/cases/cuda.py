"""Int8, float8 and zeros in 2:4 on an NVIDIA GPU, against bfloat16 under torch.compile: speed, and SQNR over float32.

An encoder of BERT-large's shape, and a decode step of GPT-2-XL's after a prompt of 128 tokens, with seeded weights:
figures are of speed, and of how far rounding moves outputs; what 2:4 does to a trained network is another matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.text import Text
from torch import Tensor, nn

import graphopt
from benchmarks.case import Settings, checked, table, times
from benchmarks.models import SEED, Batch, seeded
from graphopt.backends.cuda.device import Device
from graphopt.backends.cuda.runner import OPTIONS
from graphopt.backends.cuda.target import Cuda
from graphopt.capture.decode import DecodeStep, after_prompt, step_of
from graphopt.measure.timing import paired_calls
from graphopt.numerics.metrics import sqnr

BASELINE, CONTROL = "bfloat16, torch.compile", "the baseline again"
CAST = "cast{dtype=bfloat16}"
ENCODER = {
    "graphopt bfloat16": CAST,
    "int8, dynamic": f"quantize{{scheme=dynamic}},{CAST}",
    "int8, static": f"quantize{{scheme=static,rounding=nearest}},{CAST}",
    "float8, dynamic": f"quantize{{scheme=dynamic,dtype=float8}},{CAST}",
    "2:4": f"sparsify{{pattern=2:4}},{CAST}",
    "2:4 and int8": f"sparsify{{pattern=2:4}},quantize{{scheme=dynamic}},{CAST}",
    "2:4 and float8": f"sparsify{{pattern=2:4}},quantize{{scheme=dynamic,dtype=float8}},{CAST}",
}
DECODE = {
    "graphopt bfloat16": CAST,
    "int8 weights": f"quantize{{scheme=weight-only}},{CAST}",
    "int8, dynamic": f"quantize{{scheme=dynamic}},{CAST}",
    "2:4": f"sparsify{{pattern=2:4}},{CAST}",
    "2:4 and int8": f"sparsify{{pattern=2:4}},quantize{{scheme=dynamic}},{CAST}",
}
LEAST = 1.4
"""Times as fast as the baseline that some form of the encoder is at 64x128."""

Call = Callable[[], Any]
Made = tuple[Call, list[Tensor]]
"""What is timed, and the outputs on the CPU."""


def run(settings: Settings) -> bool:
    device = Device.here()
    if device is None:
        settings.console.print(f"nothing was run: torch {torch.__version__} finds no NVIDIA GPU here")
        return True
    settings.console.print(f"{device}, {versions()}", highlight=False)
    holds = True
    if settings.chosen("encoder"):
        holds = encoder(settings)
    if settings.chosen("decode"):
        decode(settings)
    return holds


def versions() -> str:
    """Of what makes the kernels."""
    found = {"torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    for package in ("triton", "nvidia-cusparselt-cu12", "nvidia-cusparselt-cu13"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return ", ".join(f"{name} {one}" for name, one in found.items())


def encoder(settings: Settings) -> bool:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    module = seeded(lambda: BertModel(config, add_pooling_layer=False))
    batches = {f"{rows}x{length}": tokens(rows, length) for rows, length in ((64, 128), (8, 384))}
    narrow = deepcopy(module).to("cuda", torch.bfloat16)
    compiled = torch.compile(narrow, dynamic=False, options=dict(OPTIONS))
    baseline = {name: partial(_call, compiled, _placed(batch)) for name, batch in batches.items()}
    expected = _exact(deepcopy(module).to("cuda"), batches)
    options = {"example_inputs": list(batches.values()), "calibration": list(batches.values())}
    fastest = _race(settings, "BERT-large's shape", module, ENCODER, batches, baseline, expected, options)
    best = max(fastest.values(), default=0.0)
    holds = best >= LEAST
    settings.console.print(checked(f"the fastest form runs {best:.2f} times as fast at 64x128, of {LEAST}", holds))
    return holds


def decode(settings: Settings) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    module = seeded(lambda: GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25, use_cache=False)))
    prompt = tokens(1, 128)
    with torch.inference_mode():
        tensors = step_of(module, after_prompt(module, prompt)).tensors
    step = DecodeStep(module, list(tensors))
    # Copies, as export does not take tensors of inference mode.
    own = {argument: tensors[name].clone() for argument, name in step.public_names.items()}
    with torch.no_grad():  # anew, as a step calls the model that it was made around
        narrow, _, _ = DecodeStep.around(deepcopy(module).to("cuda", torch.bfloat16), _placed(prompt))
        wide, _, _ = DecodeStep.around(deepcopy(module).to("cuda"), _placed(prompt))
    given = {name: one.to(torch.bfloat16) if one.is_floating_point() else one for name, one in _placed(own).items()}
    with torch.no_grad():
        program = torch.export.export(narrow, (), given, strict=False).module()
    compiled = torch.compile(program, dynamic=False, options=dict(OPTIONS))
    shape = "1x1 after 128"
    expected = _exact(wide, {shape: own})
    del wide
    batches = {shape: {step.public_names[name]: tensor for name, tensor in own.items()}}
    baseline = {shape: partial(_call, compiled, given)}
    options = {"example_inputs": prompt, "cache": True, "calibration": list(batches.values())}
    _race(settings, "GPT-2-XL's shape, decode", module, DECODE, batches, baseline, expected, options)


def tokens(rows: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, 30000, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _race(
    settings: Settings,
    title: str,
    module: nn.Module,
    forms: dict[str, str],
    batches: dict[str, Batch],
    baseline: Mapping[str, Call],
    expected: dict[str, list[Tensor]],
    options: dict[str, Any],
) -> dict[str, float]:
    """One interleaved run of all forms, as a table; of each form, how many times as fast it is at the first shape.

    Raises nothing of a form that there is none of: its row says why.
    """
    backend, failed = Cuda(), dict[str, str]()
    calls: dict[str, list[Call]] = {BASELINE: list(baseline.values()), CONTROL: list(baseline.values())}
    far = {BASELINE: [sqnr(expected[name][0], _outputs(call())[0]) for name, call in baseline.items()]}
    for name, passes in forms.items():
        try:
            small = graphopt.optimize(module, passes, target="cuda", measure=True, agree=False, **options)
            placed = [backend.place(batch) for batch in batches.values()]
            results = [small.runner(one) for one in placed]
        except Exception as error:  # such as float8 on an older GPU: torch and the pipeline have no common base
            failed[name] = (str(error).splitlines() or [type(error).__name__])[0]
            continue
        calls[name] = [partial(small.runner, one) for one in placed]
        far[name] = [sqnr(expected[shape][0], result[0].cpu()) for shape, result in zip(batches, results, strict=True)]
    found = paired_calls(calls, baseline=BASELINE, rounds=settings.rounds, clock=backend.clock)
    rows = table(f"{title}: times as fast as {BASELINE}, and SQNR (dB) over float32", "",
                 *(column for shape in batches for column in (shape, f"SQNR {shape}")))  # fmt: skip
    for name, one in found.items():
        pairs = zip(one.shapes, far.get(name, far[BASELINE]), strict=True)
        rows.add_row(name, *(cell for ratio, away in pairs for cell in (times(ratio), Text(f"{away:.1f}"))))
    for name, reason in failed.items():
        rows.add_row(name, Text(reason, style="yellow"))
    settings.console.print(rows)
    return {name: one.shapes[0].median for name, one in found.items() if name in forms}


def _placed(batch: Batch) -> Batch:
    return {name: tensor.to("cuda") for name, tensor in batch.items()}


def _exact(module: nn.Module, batches: dict[str, Batch]) -> dict[str, list[Tensor]]:
    """What a module on the GPU returns in float32."""
    with torch.no_grad():
        return {name: _outputs(module(**_placed(batch))) for name, batch in batches.items()}


def _call(compiled: Any, batch: Batch) -> Any:
    """As the runner of the target does it: outputs are copied out of what CUDA graphs use again."""
    with torch.no_grad():
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        result = compiled(**batch)
        return {name: one.clone() for name, one in result.items() if isinstance(one, Tensor)}


def _outputs(result: Any) -> list[Tensor]:
    return [one.detach().float().cpu() for one in result.values() if isinstance(one, Tensor)]
