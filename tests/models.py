"""Small seeded models for tests, ONNX models in text, and runs of both that use nothing of graphopt."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from graphopt.numerics.quantize import fit

VOCABULARY, WIDTH, HEADS = 48, 32, 4


# --- modules -------------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Four linears around scaled dot products; fewer `kv_heads` than heads are repeated."""

    def __init__(self, kv_heads: int = HEADS, causal: bool = False) -> None:
        super().__init__()
        self.kv_heads, self.causal = kv_heads, causal
        narrow = WIDTH // HEADS * kv_heads
        self.query, self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, narrow), nn.Linear(WIDTH, narrow)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query = self.query(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2)
        key, value = (f(x).view(*x.shape[:2], self.kv_heads, -1).transpose(1, 2) for f in (self.key, self.value))
        grouped = self.kv_heads != HEADS
        heads = F.scaled_dot_product_attention(query, key, value, mask, is_causal=self.causal, enable_gqa=grouped)
        joined = heads.transpose(1, 2).reshape(x.shape)
        y: Tensor = self.out(joined)
        return y


class EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAttention()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.act, self.down = nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.norm1(self.attention(x, mask) + x)
        x = self.norm2(self.down(self.act(self.up(x))) + x)
        return x


class Encoder(nn.Module):
    """ids (batch, seq) and mask (batch, seq), 1 at tokens -> (batch, seq, WIDTH), as BERT computes it."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(EncoderLayer() for _ in range(layers))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        allowed = mask[:, None, None, :].bool()
        x: Tensor = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, allowed)
        return x


class RmsNorm(nn.Module):
    """Written out, as Llama has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Decoder(nn.Module):
    """ids (batch, seq) -> logits (batch, seq, VOCABULARY): causal, grouped-query, gated, with a tied embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm1, self.norm2 = RmsNorm(), RmsNorm()
        self.attention = SelfAttention(kv_heads=2, causal=True)
        self.gate, self.up = nn.Linear(WIDTH, 64, bias=False), nn.Linear(WIDTH, 64, bias=False)
        self.down = nn.Linear(64, WIDTH, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return F.linear(x, self.embedding.weight)


class ConvNet(nn.Module):
    """x (batch, 3, 8, 8) -> (batch, 5): convs with batch norms, one residual add, pooling, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(y)) + x)
        x = self.head(x.mean((2, 3)))
        return x


def seeded(kind: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """An instance in eval mode whose parameters and batch-norm statistics are the same in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind(*args, **kwargs).eval()
        for inner in module.modules():
            if isinstance(inner, nn.BatchNorm2d):
                nn.init.normal_(inner.running_mean, std=0.5)  # type: ignore[arg-type]
                nn.init.uniform_(inner.running_var, 0.5, 2.0)  # type: ignore[arg-type]
                nn.init.uniform_(inner.weight, 0.5, 2.0)
    return module


def bert(layers: int = 2) -> nn.Module:
    """transformers' BertModel at this file's sizes."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    return seeded(transformers.BertModel, config)


def gpt2() -> nn.Module:
    """transformers' GPT2LMHeadModel at this file's sizes: Conv1D, tanh gelu, a cache in its default configuration."""
    import transformers

    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=32)
    return seeded(transformers.GPT2LMHeadModel, config)


def tokens(batch: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(batch: int = 2, length: int = 7) -> Tensor:
    """1 at tokens, 0 at the last two places of every row but the first."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1:, -2:] = 0
    return mask


def images(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


# --- ONNX ----------------------------------------------------------------------------------------------------------


def exported(module: nn.Module, inputs: Mapping[str, Tensor], opset: int, dynamo: bool) -> onnx.ModelProto:
    """What torch.onnx makes of a module that returns one tensor, axes 0 and 1 of every input dynamic."""
    axes = {name: {0: "batch", 1: "seq"} for name in inputs}
    auto = {name: {axis: torch.export.Dim.AUTO for axis in named} for name, named in axes.items()}
    options: dict[str, Any] = {"dynamic_shapes": auto} if dynamo else {"dynamic_axes": axes}
    options |= {"input_names": list(inputs), "output_names": ["y"], "opset_version": opset, "dynamo": dynamo}
    buffer = io.BytesIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.CRITICAL)
        to: Any = None if dynamo else buffer
        program = torch.onnx.export(module, tuple(inputs.values()), to, verbose=False, **options)
    return program.model_proto if program is not None else onnx.load_from_string(buffer.getvalue())


def model(
    text: str, tensors: Mapping[str, Tensor | np.ndarray[Any, Any]] | None = None, *,
    opset: int = 23, domains: Sequence[str] = (),
) -> onnx.ModelProto:  # fmt: skip
    """An ONNX model: `text` is a graph in ONNX's text form (and functions behind it), `tensors` its initializers."""
    imports = ", ".join([f'"" : {opset}', *(f'"{domain}" : 1' for domain in domains)])
    proto = onnx.parser.parse_model(f"<ir_version: 10, opset_import: [{imports}]> {text}")
    for name, tensor in (tensors or {}).items():
        array = tensor.numpy() if isinstance(tensor, Tensor) else tensor
        proto.graph.initializer.append(numpy_helper.from_array(np.array(array, order="C"), name))
    return proto


def quantize_weight(weight: Tensor, *, bits: int = 8, axis: int | None = 0) -> tuple[Tensor, Tensor]:
    """Signed integers (int8) and scales (float32) of a weight, symmetric about zero, one scale a slice of the axis."""
    grid = fit(weight, bits=bits, axis=axis)
    return grid.round(weight), grid.scale


def plain_run(proto: onnx.ModelProto | str, feeds: Mapping[str, Tensor]) -> list[Any]:
    """The outputs in ONNX Runtime without any optimization."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    source = proto if isinstance(proto, str) else proto.SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    results = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    return [torch.from_numpy(np.array(r)) if isinstance(r, np.ndarray) and r.dtype != object else r
            for r in results]  # fmt: skip
