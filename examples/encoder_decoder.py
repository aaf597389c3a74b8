"""An encoder-decoder in two files: a T5 that is trained here to write words backwards.

    python examples/encoder_decoder.py

The encoder runs once for each input and the decoder once for each token, so each gets a file of its own. What is
compressed in each, what is declined, and why, is in the reports.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from frame import Deployed, Out, Size, Summary, folder, program, show
from torch import Tensor, nn

import graphopt

PAD, END, LETTERS, LENGTH = 0, 1, 26, 12
Batch = dict[str, Tensor]
Files = Mapping[str, Callable[..., Any]]


class Decoder(nn.Module):
    """Tokens so far, and what the encoder says -> logits of the next token at each place."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, decoder_input_ids: Tensor, encoder_states: Tensor, encoder_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(
            encoder_outputs=(encoder_states,), attention_mask=encoder_mask, decoder_input_ids=decoder_input_ids,
            use_cache=False,
        ).logits  # fmt: skip
        return logits


def t5(width: int, layers: int) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    settings: dict[str, Any] = {"decoder_start_token_id": PAD, "tie_word_embeddings": False}
    config = T5Config(
        vocab_size=LETTERS + 2, d_model=width, d_kv=width // 4, d_ff=4 * width, num_layers=layers, num_heads=4,
        dropout_rate=0.0, pad_token_id=PAD, eos_token_id=END, use_cache=False, **settings,
    )  # fmt: skip
    model: Any = T5ForConditionalGeneration(config)
    model.set_attn_implementation("eager")
    return model.eval()


def words(batches: int, rows: int, seed: int) -> list[Batch]:
    """Random words of 4 to 12 letters, and the same backwards as labels."""
    draw, made = random.Random(seed), []
    for _ in range(batches):
        ids, labels = torch.full((rows, LENGTH + 1), PAD), torch.full((rows, LENGTH + 1), -100)
        for row in range(rows):
            word = [draw.randrange(LETTERS) + 2 for _ in range(draw.randint(4, LENGTH))]
            ids[row, : len(word) + 1] = torch.tensor([*word, END])
            labels[row, : len(word) + 1] = torch.tensor([*reversed(word), END])
        given = torch.cat([torch.full((rows, 1), PAD), labels[:, :-1].clamp(min=PAD)], 1)
        mask = (ids != PAD).long()
        made.append({"input_ids": ids, "attention_mask": mask, "decoder_input_ids": given, "labels": labels})
    return made


def written(encoder: Callable[..., Any], decoder: Callable[..., Any], batch: Batch) -> Tensor:
    """Greedy decoding: one call of the encoder, one of the decoder for each token."""
    mask = batch["attention_mask"]
    with torch.no_grad():
        states = encoder(input_ids=batch["input_ids"], attention_mask=mask)["last_hidden_state"]
        tokens = torch.full((len(mask), 1), PAD)
        for _ in range(LENGTH + 1):
            logits = decoder(decoder_input_ids=tokens, encoder_states=states, encoder_mask=mask)
            logits = logits["output"] if isinstance(logits, Mapping) else logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens[:, 1:]


def accuracy(encoder: Callable[..., Any], decoder: Callable[..., Any], batches: list[Batch]) -> float:
    """Share of words that are right in every letter."""
    right = [
        ((written(encoder, decoder, batch) == batch["labels"]) | (batch["labels"] == -100)).all(1) for batch in batches
    ]
    return float(torch.cat(right).float().mean())


def split_batches(encoder: Callable[..., Any], batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """What the encoder is called with, and what the decoder is."""
    first = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    with torch.no_grad():
        second = [
            {"decoder_input_ids": batch["decoder_input_ids"], "encoder_mask": batch["attention_mask"],
             "encoder_states": encoder(**one)["last_hidden_state"]}
            for one, batch in zip(first, batches, strict=True)
        ]  # fmt: skip
    return first, second


def main(size: Size = "full", out: Out = Path("out/encoder_decoder")) -> None:
    """Train, split in two, make both int8, and decode with the two files."""
    out, summary = folder(out), Summary()
    full = size == "full"
    module: Any = t5(128, 3) if full else t5(16, 1)
    train = words(600 if full else 2, 32 if full else 2, seed=1)
    test = words(4 if full else 1, 32 if full else 2, seed=2)
    trained = graphopt.optimize(
        module, f"finetune{{{'epochs=2' if full else 'steps=1'} lr=2e-3}}", training=train, measure=False
    )
    module.load_state_dict(trained.state_dict())

    decoder = Decoder(module).eval()
    for_encoder, for_decoder = split_batches(module.encoder, train[:8])
    files: dict[str, Deployed] = {}
    read = {0: "batch", 1: "read"}
    axes = {"decoder_input_ids": {0: "batch", 1: "written"}, "encoder_mask": read, "encoder_states": read}
    for name, part, batches, dynamic in (
        ("encoder", module.encoder, for_encoder, None), ("decoder", decoder, for_decoder, axes)
    ):  # fmt: skip
        small = graphopt.optimize(part, "quantize", calibration=batches, dynamic_shapes=dynamic)
        show(small)
        path = small.export(out / f"{name}.onnx")
        files[name] = Deployed(path)
        summary.model(small, path, size, name)
    before = accuracy(module.encoder, decoder, test)
    summary["accuracy"] = f"{before:.1%} -> {accuracy(files['encoder'], files['decoder'], test):.1%} of words"
    summary.show()


if __name__ == "__main__":
    program(main)
