"""Text generation: a decode step with its cache in one ONNX file, in int8 and with 4-bit weights, token by token.

    python examples/generation.py

GRAPHOPT_DATA=FOLDER takes stories260K, a Llama of 260,000 parameters that tells stories, from that folder, and
--model FOLDER a language model of yours; else a GPT-2 is trained on sentences that are made here. The prompt and each
further token run through one file: it takes any number of tokens after a cache of any length, an empty one included.
"""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from frame import Deployed, Out, Size, Summary, data, folder, program
from texts import encoder, quiet_transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

import graphopt
from graphopt.errors import UsageError, first_line, outer_door
from graphopt.serving import Predictor

PARTS = (
    ("The old sailor", "A small dog", "My neighbour", "The engineer", "Her sister"),
    ("found", "painted", "was looking for", "wrote about", "sold"),
    ("a red bicycle", "the broken clock", "a letter", "the last train", "a quiet garden"),
    ("in the rain .", "every Sunday .", "near the harbour .", "before breakfast .", "without a word ."),
)
"""Of sentences that a model learns here."""


def sentences_model(full: bool) -> tuple[Any, Tokenizer, str]:
    """A GPT-2 that learns a few hundred sentences, its tokenizer, and a prompt."""
    transformers = quiet_transformers()
    texts = [" ".join(parts) for parts in itertools.product(*PARTS)]
    tokenizer = Tokenizer(models.WordLevel(unk_token="[end]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="@@")
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[end]"], show_progress=False))
    torch.manual_seed(0)
    width, layers = (256, 4) if full else (16, 1)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_embd=width, n_layer=layers, n_head=4, n_positions=128, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    module = transformers.GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(60 if full else 1):  # five sentences in a row, eight times
        rows = torch.randint(0, len(texts), (8, 5), generator=generator).tolist()
        ids = [tokenizer.encode(" ".join(texts[place] for place in row)).ids[:36] for row in rows]
        batches.append({"input_ids": torch.tensor([row[: min(map(len, ids))] for row in ids])})
    steps = "epochs=1" if full else "steps=1"
    trained = graphopt.optimize(module.eval(), f"finetune{{{steps} lr=1e-3}}", training=batches, measure=False)
    module.load_state_dict(trained.state_dict())
    return module, tokenizer, "The old sailor"


def stories(weights: Path, words: Path) -> tuple[Any, Tokenizer, str]:
    """stories260K as a Llama of transformers, its tokenizer, and a prompt."""
    transformers = quiet_transformers()
    raw = weights.read_bytes()
    width, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack("7i", raw[:28])
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=length, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    floats = torch.from_numpy(np.frombuffer(raw, np.float32, offset=28).copy())
    module = transformers.LlamaForCausalLM(config).eval()
    state, kv = module.state_dict(), width // heads * kv_heads

    def halves(weight: Tensor, heads: int) -> Tensor:
        """Rotary pairs lie beside each other in the file, and half a head apart in transformers."""
        return weight.view(heads, -1, 2, width).transpose(1, 2).reshape(weight.shape)

    place = 0
    for name, shape, change in (
        ("embed_tokens", (vocabulary, width), None), ("input_layernorm", (width,), None),
        ("self_attn.q_proj", (width, width), heads), ("self_attn.k_proj", (kv, width), kv_heads),
        ("self_attn.v_proj", (kv, width), None), ("self_attn.o_proj", (width, width), None),
        ("post_attention_layernorm", (width,), None), ("mlp.gate_proj", (hidden, width), None),
        ("mlp.down_proj", (width, hidden), None), ("mlp.up_proj", (hidden, width), None), ("norm", (width,), None),
    ):  # fmt: skip
        whole = name in ("embed_tokens", "norm")
        for layer in range(1 if whole else layers):
            weight = floats[place : place + int(np.prod(shape))].view(shape)
            place += weight.numel()
            key = f"model.{name}.weight" if whole else f"model.layers.{layer}.{name}.weight"
            state[key] = weight if change is None else halves(weight, change)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    module.load_state_dict(state)
    return module, pieces(words), "Once upon a time, there was a little dog"


def pieces(path: Path) -> Tokenizer:
    """A file of pieces of words, the earliest merged first, as a tokenizer of the library tokenizers."""
    raw, place, vocabulary = path.read_bytes(), 4, dict[str, int]()
    while place < len(raw):
        (size,) = struct.unpack("i", raw[place + 4 : place + 8])  # behind a score, which follows the order
        text = raw[place + 8 : place + 8 + size].decode("utf-8").strip("\n") or "\n"
        vocabulary[text.replace(" ", "▁")] = len(vocabulary)
        place += 8 + size
    merges = [
        (whole[:cut], whole[cut:]) for whole in vocabulary for cut in range(1, len(whole))
        if whole[:cut] in vocabulary and whole[cut:] in vocabulary and not whole.startswith("<")
    ]  # fmt: skip
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", None, [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    return tokenizer


def own(place: Path, size: Size) -> tuple[Any, Tokenizer, str]:
    """The model in a folder of transformers, its tokenizer, and a prompt. Raises UsageError where one is missing."""
    module, _ = encoder("AutoModelForCausalLM", place, size)
    with outer_door(UsageError, f"{place} holds no tokenizer.json, which programs without transformers read"):
        return module.float(), Tokenizer.from_file(str(place / "tokenizer.json")), "Once upon a time"


def greedy(model: Deployed, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens after a prompt: the prompt in one call with an empty cache, then a call for each token."""
    past: dict[str, Any] = {
        one.name: np.zeros([1, *(size if isinstance(size, int) else 0 for size in one.shape[1:])], np.float32)
        for one in model.session.get_inputs() if one.name.startswith("past_key_values")
    }  # fmt: skip
    written, given = list[int](), ids
    for _ in range(count):
        mask = np.ones((1, len(ids) + len(written)), np.int64)
        outputs = model(input_ids=np.array([given]), attention_mask=mask, **past)
        written.append(int(outputs["logits"][0, -1].argmax()))
        given, past = written[-1:], {name: outputs[name.replace("past_key_values", "present")] for name in past}
    return written


def parting(module: Any, ids: list[int], exact: list[int], found: list[int]) -> str:
    """Where two texts part, and how sure the original was of its token there."""
    place = next((place for place, (a, b) in enumerate(zip(exact, found, strict=True)) if a != b), None)
    if place is None:
        return f"all {len(exact)} tokens are those of float32"
    with torch.no_grad():
        logits = module(torch.tensor([ids + exact[:place]])).logits[0, -1]
    margin = float(logits[exact[place]] - logits[found[place]])
    return f"parts from float32 at token {place + 1} of {len(exact)}, where the logits differ by {margin:.3f}"


def rate(generate: Callable[[], Any], count: int) -> float:
    """Tokens in a second: the best of three runs."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        generate()
        seconds.append(time.perf_counter() - start)
    return count / min(seconds)


def with_genai(checkpoint: Path, out: Path, ids: list[int], count: int) -> Callable[[], None]:
    """What onnxruntime-genai makes of a checkpoint, in 4 bits, as a function that writes `count` tokens.

    Raises ImportError where it is not installed, and RuntimeError where it does not build or run the model.
    """
    import onnxruntime_genai as og

    command = [
        sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(out), "-c", str(out),
        "-p", "int4", "-e", "cpu", "--extra_options", "block_size=32", "accuracy_level=4",
    ]  # fmt: skip
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if "Error: " in line]
        raise RuntimeError(said[-1] if said else "its model builder failed")
    model = og.Model(str(out))

    def write() -> None:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(min_length=len(ids) + count, max_length=len(ids) + count, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.array([ids], np.int32))
        while not generator.is_done():
            generator.generate_next_token()

    write()
    return write


def main(
    size: Size = "full",
    out: Out = Path("out/generation"),
    model: Annotated[Path | None, typer.Option(help="Folder of a language model and its tokenizer.")] = None,
) -> None:
    """Make the decode step of a language model small and fast, and write texts with it."""
    out, summary = folder(out), Summary()
    full = size == "full"
    weights, words = data("stories260k", "stories260K.bin"), data("stories260k", "tok512.bin")
    if model is not None:
        module, tokenizer, prompt = own(model, size)
    else:
        module, tokenizer, prompt = stories(weights, words) if full and weights and words else sentences_model(full)
    count = 64 if full else 4
    checkpoint = folder(out / "checkpoint")
    module.save_pretrained(checkpoint)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    ids = tokenizer.encode(prompt).ids
    exact = list[int]()
    made = dict[str, graphopt.Optimized]()

    def many(tokens: float) -> str:
        return f"{tokens / eager:.1f} times as many in a second as PyTorch, eager"

    asked = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    eager = rate(lambda: module.generate(torch.tensor([ids]), **asked), count) if full else 1.0
    for name, passes in {
        "float32": None,
        "int8": "quantize{scheme=dynamic}",
        "4 bits": "quantize{scheme=weight-only bits=[4,8] block=32}",
    }.items():
        made[name] = graphopt.optimize(module, passes, cache=True, example_inputs={"input_ids": torch.tensor([ids])})
        path = made[name].export(out / f"{name.replace(' ', '-')}.onnx")
        deployed = Deployed(path)
        found = greedy(deployed, ids, count)
        exact = exact or found
        summary.model(made[name], path, size, name)
        summary[f"{name} accuracy"] = parting(module, ids, exact, found)
        summary[f"{name} tokens"] = (
            many(rate(partial(greedy, deployed, ids, count), count)) if full else "not timed at size tiny"
        )
    summary["genai tokens"] = "not timed at size tiny"
    if full:
        try:
            summary["genai tokens"] = many(rate(with_genai(checkpoint, out / "genai", ids, count), count))
        except ImportError:
            summary["genai tokens"] = "not timed: onnxruntime-genai is not installed"
        except Exception as error:  # those of its engine have no base of their own
            summary["genai tokens"] = f"not timed: onnxruntime-genai says {first_line(error)}"
    predictor = Predictor(made["4 bits"].bundle(out / "bundle", tokenizer=checkpoint))
    print(prompt, predictor.generate(prompt, max_tokens=count))
    print("-- drawn from the likeliest tokens, as they come, up to the first full stop:")
    for piece in predictor.generate(prompt, stream=True, max_tokens=count, top_p=0.9, seed=0, stop="."):
        print(piece, end="", flush=True)
    print()
    summary.show()


if __name__ == "__main__":
    program(main)
