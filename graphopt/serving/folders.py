"""What the folder of a Hugging Face model says of texts, images and answers; data only, no code of it is run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import UsageError
from graphopt.serving.manifest import AnswerSpec, ImageSpec, TextSpec

TOKENIZER = "tokenizer.json"
_POOLINGS = {
    frozenset({"pooling_mode_cls_token"}): "cls", frozenset({"pooling_mode_mean_tokens"}): "mean", frozenset(): "mean",
}  # fmt: skip
"""What `pooling_mode_...` of sentence-transformers says, where graphopt pools so; the mean is its default."""
_UNLIMITED = 1 << 20
"""transformers writes 10**30 where a tokenizer has no limit."""


@dataclass(frozen=True)
class Folder:
    """The settings in a folder."""

    has_tokenizer: bool
    config: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    image: Mapping[str, Any]
    generation: Mapping[str, Any]
    pooling: Mapping[str, Any]
    sentence: Mapping[str, Any]
    is_normalized: bool
    """Whether a sentence encoder's embeddings have length 1."""
    has_further_modules: bool
    """Whether something is computed behind the pooling of a sentence encoder, such as a Dense layer."""

    @classmethod
    def of(cls, folder: Path) -> Folder:
        modules = folder / "modules.json"
        listed = modules.read_text(encoding="utf-8") if modules.is_file() else ""
        return cls(
            has_tokenizer=(folder / TOKENIZER).is_file(),
            config=_settings(folder / "config.json"),
            tokenizer=_settings(folder / "tokenizer_config.json"),
            image=_settings(folder / "preprocessor_config.json"),
            generation=_settings(folder / "generation_config.json"),
            pooling=_settings(folder / "1_Pooling" / "config.json"),
            sentence=_settings(folder / "sentence_bert_config.json"),
            is_normalized="Normalize" in listed,
            has_further_modules=any(name in listed for name in ("Dense", "WeightedLayerPooling", "CNN", "LSTM")),
        )

    @property
    def is_causal(self) -> bool:
        """Whether the model predicts the next token."""
        named = self.config.get("architectures")
        several = named if isinstance(named, list) else []
        return any(str(one).endswith(("ForCausalLM", "LMHeadModel")) for one in several)

    @property
    def max_length(self) -> int | None:
        """Most tokens: the least of the limits that the folder names."""
        said = (
            self.tokenizer.get("model_max_length"), self.sentence.get("max_seq_length"),
            self.config.get("max_position_embeddings"), self.config.get("n_positions"),
        )  # fmt: skip
        return min((int(one) for one in said if isinstance(one, int | float) and 0 < one < _UNLIMITED), default=None)

    def text_spec(self, generates: bool) -> TextSpec:
        pad = self.config.get("pad_token_id")
        ends = self.generation.get("eos_token_id", self.config.get("eos_token_id"))
        several = ends if isinstance(ends, list) else [ends]
        return TextSpec(
            TOKENIZER,
            self.max_length,
            pad if isinstance(pad, int) else 0,
            generates,
            tuple(int(one) for one in several if isinstance(one, int)) if generates else (),
        )

    def image_spec(self, inputs: Sequence[str]) -> ImageSpec | None:
        """The transforms of an image processor; None where the folder holds none, or the model takes no images."""
        name = "pixel_values" if "pixel_values" in inputs else inputs[0] if len(inputs) == 1 else None
        if not self.image or name is None:
            return None
        own = self.image
        normalizes = own.get("do_normalize", True)
        return ImageSpec(
            input=name,
            resize=_edges(own.get("size")) if own.get("do_resize", True) else None,
            crop=_crop(own.get("crop_size", own.get("size"))) if own.get("do_center_crop", False) else None,
            resample=int(own.get("resample", 2)),
            scale=float(own.get("rescale_factor", 1 / 255)) if own.get("do_rescale", True) else 1.0,
            mean=tuple(map(float, own.get("image_mean", [0.5] * 3))) if normalizes else (0.0,) * 3,
            std=tuple(map(float, own.get("image_std", [0.5] * 3))) if normalizes else (1.0,) * 3,
        )

    def answer_spec(self, outputs: Sequence[str]) -> AnswerSpec | None:
        """Labels of a classifier of one of several, or the pooling of a sentence encoder.

        None for what answers with its outputs as they are: a regression, several labels at once, another way to pool.
        """
        named = self.config.get("architectures")
        kind = str(named[0]) if isinstance(named, list) and named else ""
        labels = self.config.get("id2label")
        if "logits" in outputs and kind.endswith(("ForSequenceClassification", "ForImageClassification")):
            count = len(labels) if isinstance(labels, dict) else self.config.get("num_labels", 2)
            if count < 2 or self.config.get("problem_type") in ("regression", "multi_label_classification"):
                return None
            table = labels if isinstance(labels, dict) else {}
            return AnswerSpec("logits", tuple(str(table.get(str(one), f"LABEL_{one}")) for one in range(count)))
        if self.pooling and "last_hidden_state" in outputs:
            modes = {name for name, value in self.pooling.items() if name.startswith("pooling_mode_") and value is True}
            way = _POOLINGS.get(frozenset(modes))
            if way is not None and not self.has_further_modules:
                return AnswerSpec("last_hidden_state", pooling=way, normalize=self.is_normalized)
        return None


def _settings(file: Path) -> Mapping[str, Any]:
    """The object in a file of JSON; empty where there is no file. Raises UsageError for anything else."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} is no JSON") from error
    if not isinstance(found, dict):
        raise UsageError(f"{file} holds no settings: it is no object")
    return found


def _edges(size: Any) -> tuple[int, ...] | None:
    if isinstance(size, int):
        return (size,)
    if isinstance(size, dict) and "shortest_edge" in size:
        return (int(size["shortest_edge"]),)
    if isinstance(size, dict) and {"height", "width"} <= set(size):
        return int(size["height"]), int(size["width"])
    return None


def _crop(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    edges = _edges(size)
    return None if edges is None else (edges[0], edges[-1])
