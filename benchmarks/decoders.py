"""One decode step of a language model behind a cache of a given length, on each engine: calls that can be timed.

Each call reads one token at the same place again: the cache is cut back to its length before it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

Step = Callable[[], object]
TOKEN = 5


def graphopt_step(path: Path, length: int, threads: int) -> Step:
    """A file of graphopt, in ONNX Runtime alone."""
    from graphopt.backends.onnxruntime.cache import Decoder

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    decoder = Decoder(session, length + 1)
    decoder.step(np.full((1, length), TOKEN, np.int64))

    def step() -> object:
        decoder.truncate(length)
        return decoder.step(np.array([[TOKEN]], np.int64))

    return step


def eager_step(module: nn.Module, length: int) -> Step:
    """The module itself in PyTorch, in float32."""
    from transformers import DynamicCache

    held = DynamicCache()
    with torch.inference_mode():
        module(input_ids=torch.full((1, length), TOKEN), past_key_values=held)

    @torch.inference_mode()
    def step() -> object:
        result = module(input_ids=torch.tensor([[TOKEN]]), past_key_values=held, use_cache=True)
        held.crop(-1)
        return result

    return step


# --- onnxruntime-genai -----------------------------------------------------------------------------------------------


def genai_folder(folder: Path, to: Path, bits: int) -> Path:
    """What its model builder (0.18) makes of a Hugging Face folder: weights of 4 or 8 bits in blocks of 32."""
    command = [
        sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(to),
        "-c", str(to / "cache"), "-p", f"int{bits}", "-e", "cpu",
        "--extra_options", "block_size=32", "accuracy_level=4",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"its model builder: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return to


def genai_step(folder: Path, length: int, threads: int) -> Step:
    """A folder of onnxruntime-genai."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {threads}}}}}}}}}')
    model = og.Model(config)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=length + 2)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.full((1, length), TOKEN, np.int32))

    def step() -> object:
        generator.rewind_to(length)
        generator.append_tokens(np.array([[TOKEN]], np.int32))
        return generator.get_logits()

    return step


# --- llama.cpp -------------------------------------------------------------------------------------------------------


def gguf_file(module: Any, path: Path) -> Path:
    """A Llama's weights in float32, as llama.cpp reads them. Its rows of queries and keys stand in another order, which
    is left as it is: it changes the numbers, and not what is read."""
    import gguf

    config = module.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in module.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            number, _, part = stem.removeprefix("model.layers.").partition(".")
            names[stem] = f"blk.{number}.{parts[part]}"
        writer.add_tensor(f"{names[stem]}.weight", tensor.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized_gguf(source: Path, to: Path, kind: str) -> Path:
    """kind: Q4_0 or Q8_0."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(to).encode(), parameters):
        raise RuntimeError(f"llama.cpp does not quantize to {kind}")
    return to


def llama_cpp_step(path: Path, length: int, threads: int) -> Step:
    """A GGUF file in llama.cpp."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=length + 8, n_threads=threads, n_threads_batch=threads, verbose=False)
    model.eval([TOKEN] * length)

    def step() -> object:
        model.n_tokens = length
        return model.eval([TOKEN])

    return step
