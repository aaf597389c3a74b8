"""Tokens a second of language models with a cache, one row: bound by how fast weights and cache are read.

Weights are random, drawn on the spot. All engines take turns at one token behind a cache of fixed length. The bytes
that a token reads are those of the weights, without the table of embeddings, and of the cache in float32.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import decoders
from benchmarks.case import Settings, checked, table
from benchmarks.decoders import Step
from benchmarks.models import gpt2, seeded
from benchmarks.peers import attempt, quiet
from benchmarks.speed import write
from graphopt.measure.timing import paired_calls

LENGTHS = (128, 1024)
"""Positions in the cache."""
OURS = {
    "fp32": None,
    "int8": "quantize{scheme=weight-only bits=8 block=32}",
    "int4": "quantize{scheme=weight-only bits=4 block=32}",
}
BASELINE = "graphopt int4"
SECONDS, MEMORY = 60.0, 3.0
"""Most seconds that optimizing the Llama of 245 million takes, and most memory, in sizes of the model."""


@dataclass(frozen=True)
class Shape:
    """A model to decode with, and the sizes of its cache."""

    name: str
    make: Callable[[], nn.Module]
    layers: int
    kv_width: int
    bounded: bool = False
    """Whether optimizing it has the bounds SECONDS and MEMORY."""


def run(settings: Settings) -> bool:
    holds, everything = True, dict[str, Any]()
    for key, shape in SHAPES.items():
        if not settings.chosen(key):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found, fits = _measured(shape, Path(folder), settings)
        everything[key] = found
        holds = holds and fits
    write(settings, "decoding", everything)
    return holds


def _measured(shape: Shape, folder: Path, settings: Settings) -> tuple[dict[str, Any], bool]:
    module = shape.make()
    weights = sum(parameter.numel() for parameter in module.parameters())
    files, made = _optimized(shape, module, folder, settings.threads)
    steps, failed = dict[str, list[Step]](), dict[str, str]()

    def add(name: str, make: Callable[[int], Step]) -> None:
        several = attempt(lambda: [make(length) for length in LENGTHS])
        if isinstance(several, str):
            failed[name] = several
        else:
            steps[name] = several

    for name, path in files.items():
        add(f"graphopt {name}", partial(decoders.graphopt_step, path, threads=settings.threads))
    add("PyTorch eager", lambda length: decoders.eager_step(module, length))
    for name, make in _peers(module, folder, settings.threads).items():
        add(name, make)
    found = paired_calls(steps, baseline=BASELINE, rounds=settings.rounds)
    rates = {
        name: [1 / next(iter(one.seconds.values()))[0] if name == BASELINE else 1 / one.seconds[name][0]
               for one in ratios.shapes]
        for name, ratios in found.items()
    }  # fmt: skip
    rows = table(f"{shape.name}, {weights / 1e6:.0f} million parameters: tokens a second (GB/s read)", "",
                 *(f"cache of {length}" for length in LENGTHS), "over int4")  # fmt: skip
    holds = True
    for name, several in rates.items():
        best = max((rates[peer][0] for peer in rates if _same_bits(name, peer)), default=0.0)
        fits = not name.startswith("graphopt") or several[0] >= best
        read = [_bytes(files.get(name.removeprefix("graphopt ")), module, shape, length) for length in LENGTHS]
        cells = [f"{rate:.1f}" + (f" ({rate * one / 1e9:.1f})" if one else "")
                 for rate, one in zip(several, read, strict=True)]  # fmt: skip
        rows.add_row(name, checked(cells[0], fits), *cells[1:], f"{found[name].overall.median:.2f}")
        holds = holds and fits
    for name, why in failed.items():
        rows.add_row(name, why)
    settings.console.print(rows)
    fits = not shape.bounded or (made["seconds"] <= SECONDS and made["peak"] <= MEMORY * 4 * weights)
    said = f"optimizing to int4: {made['seconds']:.0f} s, peak {made['peak'] / (4 * weights):.1f} times the model"
    settings.console.print(checked(said, fits))
    return {"tokens a second": rates, "failed": failed, "optimizing": made}, holds and fits


def _optimized(
    shape: Shape, module: nn.Module, folder: Path, threads: int
) -> tuple[dict[str, Path], dict[str, float]]:
    """A file for each precision, and what it took to make the one of int4, which is made first."""
    import graphopt

    files, made = dict[str, Path](), dict[str, float]()
    for name in reversed(OURS):
        start = time.perf_counter()
        prompt = {"input_ids": torch.full((1, LENGTHS[0]), decoders.TOKEN)}
        with quiet():
            small = graphopt.optimize(
                module, OURS[name], example_inputs=prompt, cache=True, threads=threads, measure=True
            )
            files[name] = small.export(folder / f"{name}.onnx")
        if not made:
            peak = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            made = {"seconds": time.perf_counter() - start, "peak": peak}
        del small
    return files, made


def _peers(module: nn.Module, folder: Path, threads: int) -> dict[str, Callable[[int], Step]]:
    """What makes the step of each peer; those that cannot make their file fail when they are called."""
    source = folder / "hf"

    def genai(bits: int) -> Callable[[int], Step]:
        def make(length: int) -> Step:
            to = folder / f"genai-{bits}"
            if not to.exists():
                _save(module, source)
                decoders.genai_folder(source, to, bits)
            return decoders.genai_step(to, length, threads)

        return make

    def llama_cpp(kind: str) -> Callable[[int], Step]:
        def make(length: int) -> Step:
            whole, path = folder / "f32.gguf", folder / f"{kind}.gguf"
            if not whole.exists():
                decoders.gguf_file(module, whole)
            if not path.exists():
                decoders.quantized_gguf(whole, path, kind)
            return decoders.llama_cpp_step(path, length, threads)

        return make

    found = {f"onnxruntime-genai int{bits}": genai(bits) for bits in (8, 4)}
    if hasattr(module.config, "num_key_value_heads"):
        found |= {f"llama.cpp {kind}": llama_cpp(kind) for kind in ("Q8_0", "Q4_0")}
    return found


def _save(module: nn.Module, folder: Path) -> None:
    """A Hugging Face folder with a tokenizer of one word, which builders ask for."""
    if folder.exists():
        return
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    module.save_pretrained(folder)  # type: ignore[operator]
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")  # type: ignore[no-untyped-call]
    fast.save_pretrained(folder)


def _same_bits(ours: str, peer: str) -> bool:
    """Whether a peer computes with weights of as many bits as one of our files."""
    alike = {
        "graphopt int4": ("onnxruntime-genai int4", "llama.cpp Q4_0"),
        "graphopt int8": ("onnxruntime-genai int8", "llama.cpp Q8_0"),
        "graphopt fp32": ("PyTorch eager",),
    }
    return peer in alike.get(ours, ())


def _bytes(file: Path | None, module: nn.Module, shape: Shape, length: int) -> float:
    """What a token reads of one of our files and of the cache; 0 of other engines."""
    if file is None:
        return 0.0
    import onnx

    weights = {one.name: len(one.raw_data) for one in onnx.load(file).graph.initializer}
    table_bytes = max((size for name, size in weights.items() if "embed" in name or "wte" in name), default=0)
    return float(sum(weights.values()) - table_bytes + 2 * 4 * shape.layers * shape.kv_width * length)


def _llama(layers: int, width: int, heads: int, kv_heads: int, inner: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=32000, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=2048,
        )  # fmt: skip
        return seeded(lambda: LlamaForCausalLM(config))

    return make


SHAPES = {
    "llama-245m": Shape("Llama", _llama(16, 1024, 16, 4, 2816), 16, 256, bounded=True),
    "llama-1.1b": Shape("Llama", _llama(22, 2048, 32, 4, 5632), 22, 256),
    "gpt2": Shape("GPT-2", gpt2, 12, 768),
}
"""By what they are called on the command line."""
