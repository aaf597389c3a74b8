"""Encoder-decoders in two files each: a T5 that is trained here to sort letters, and a Whisper.

    python examples/encoder_decoder.py

The encoder runs once for each input and the decoder once for each token, so each gets a file of its own. What is
compressed in each, what is declined, and why, is in the reports. The Whisper reads features of sound through two
convolutions; its weights are random, so that it is compared with itself in float32, and not with what was said.
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
VOCABULARY, MEL_BINS, FRAMES = 512, 40, 200
"""Of the Whisper: its tokens, and the features of a sound, which its encoder halves in time."""
Batch = dict[str, Tensor]
Files = tuple[Callable[..., Any], Callable[..., Any]]
"""An encoder and a decoder."""


class Decoder(nn.Module):
    """Tokens so far, and what the encoder says -> logits of the next token at each place.

    encoder_mask: which states are of real tokens; a Whisper has none, as it reads sound of one length.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, decoder_input_ids: Tensor, encoder_states: Tensor, encoder_mask: Tensor | None = None) -> Tensor:
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


def whisper(width: int, layers: int) -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=MEL_BINS, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width,
        max_source_positions=FRAMES // 2, max_target_positions=32, pad_token_id=PAD, bos_token_id=END, eos_token_id=END,
        decoder_start_token_id=END, use_cache=False, init_std=0.1,
    )  # fmt: skip
    model: Any = WhisperForConditionalGeneration(config)
    return model.eval()


def sounds(batches: int, rows: int, seed: int) -> list[Batch]:
    """Random features of sound, and random tokens that were written so far."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_features": torch.randn(rows, MEL_BINS, FRAMES, generator=generator),
         "decoder_input_ids": torch.randint(2, VOCABULARY, (rows, LENGTH), generator=generator)}
        for _ in range(batches)
    ]  # fmt: skip


def words(batches: int, rows: int, seed: int) -> list[Batch]:
    """Random words of 4 to 12 letters, and as labels their letters in the order of the alphabet."""
    draw, made = random.Random(seed), []
    for _ in range(batches):
        ids, labels = torch.full((rows, LENGTH + 1), PAD), torch.full((rows, LENGTH + 1), -100)
        for row in range(rows):
            word = [draw.randrange(LETTERS) + 2 for _ in range(draw.randint(4, LENGTH))]
            ids[row, : len(word) + 1] = torch.tensor([*word, END])
            labels[row, : len(word) + 1] = torch.tensor([*sorted(word), END])
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
    read = ("input_ids", "attention_mask", "input_features")
    first = [{name: batch[name] for name in read if name in batch} for batch in batches]
    second = []
    for one, batch in zip(first, batches, strict=True):
        with torch.no_grad():
            states = encoder(**one)["last_hidden_state"]
        masks = {"encoder_mask": batch["attention_mask"]} if "attention_mask" in batch else {}
        second.append({"decoder_input_ids": batch["decoder_input_ids"], "encoder_states": states} | masks)
    return first, second


def deployed(
    name: str, encoder: Any, decoder: Decoder, batches: list[Batch], out: Path, summary: Summary, size: Size
) -> tuple[Deployed, Deployed]:
    """Both halves in int8, each in a file of its own."""
    for_encoder, for_decoder = split_batches(encoder, batches)
    has_mask = "encoder_mask" in for_decoder[0]  # and inputs of any length
    read = {0: "batch", 1: "read"} if has_mask else {0: "batch"}
    axes = {"decoder_input_ids": {0: "batch", 1: "written"}, "encoder_states": read}
    axes |= {"encoder_mask": read} if has_mask else {}
    files = []
    for half, part, given, dynamic in (
        ("encoder", encoder, for_encoder, None), ("decoder", decoder, for_decoder, axes)
    ):  # fmt: skip
        print(f"--- {name}, {half}")
        small = graphopt.optimize(part, "quantize", calibration=given, dynamic_shapes=dynamic)
        show(small)
        path = small.export(out / f"{name.lower()}-{half}.onnx")
        files.append(Deployed(path))
        summary.model(small, path, size, f"{name} {half}")
    return files[0], files[1]


def same_tokens(before: Files, after: Files, batches: list[Batch]) -> float:
    """Share of places where two encoder-decoders find the same token the likeliest."""
    same = []
    for batch in batches:
        found = []
        for encoder, decoder in (before, after):
            (_,), (given,) = split_batches(encoder, [batch])
            with torch.no_grad():
                logits = decoder(**given)
            found.append((logits["output"] if isinstance(logits, Mapping) else logits).argmax(-1))
        same.append((found[0] == found[1]).float())
    return float(torch.cat(same).mean())


def main(size: Size = "full", out: Out = Path("out/encoder_decoder")) -> None:
    """Train a T5, split it and a Whisper in two, make all parts int8, and decode with the files."""
    out, summary = folder(out), Summary()
    full = size == "full"
    module: Any = t5(128, 3) if full else t5(16, 1)
    train = words(600 if full else 2, 32 if full else 2, seed=1)
    test = words(4 if full else 1, 32 if full else 2, seed=2)
    trained = graphopt.optimize(
        module, f"finetune{{{'epochs=2' if full else 'steps=1'} lr=1e-3}}", training=train, measure=False
    )
    module.load_state_dict(trained.state_dict())
    decoder = Decoder(module).eval()
    files = deployed("T5", module.encoder, decoder, train[:8], out, summary, size)
    summary["T5 accuracy"] = f"{accuracy(module.encoder, decoder, test):.1%} -> {accuracy(*files, test):.1%} of words"

    module = whisper(128, 3) if full else whisper(16, 1)
    encoder, decoder = module.get_encoder(), Decoder(module).eval()
    heard = sounds(8 if full else 2, 4 if full else 1, seed=1)
    files = deployed("Whisper", encoder, decoder, heard, out, summary, size)
    same = same_tokens((encoder, decoder), files, sounds(4 if full else 1, 4, seed=2))
    summary["Whisper accuracy"] = f"{same:.1%} of the likeliest tokens are those of float32"
    summary.show()


if __name__ == "__main__":
    program(main)
