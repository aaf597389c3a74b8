"""Question answering with BERT: fine-tune, prune, distil the span logits, quantize to int8, and find the same spans.

    python examples/question_answering.py
    python examples/question_answering.py --model FOLDER     # a BERT of yours, with its tokenizer

The questions are made from templates; no weights are downloaded.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from frame import Deployed, Out, Size, Summary, folder, program
from texts import encoder
from torch import Tensor

import graphopt

LENGTH, STRIDE = 64, 24
"""Tokens in a window, and how many of them the next window repeats."""
LONGEST_ANSWER = 8

PEOPLE = (
    "Ada", "Boris", "Carla", "David", "Elena", "Felix", "Greta", "Hugo", "Irina", "Jonas", "Karin", "Leo", "Marta",
    "Nils", "Olga", "Paul", "Rosa", "Simon", "Tilda", "Viktor",
)  # fmt: skip
FACTS = {
    "Where does {} live?": (
        "{} lives in {}.",
        ["Lisbon", "Oslo", "Vienna", "Prague", "Dublin", "Athens", "Riga", "Turin", "Geneva", "Krakow"],
    ),
    "What is the job of {}?": (
        "{} works as a {}.",
        ["baker", "nurse", "plumber", "judge", "farmer", "pilot", "dentist", "tailor"],
    ),
    "Which instrument does {} play?": (
        "{} plays the {}.",
        ["piano", "violin", "cello", "flute", "trumpet", "harp", "organ", "drums"],
    ),
    "What does {} like to eat?": (
        "{} likes to eat {}.",
        ["bread", "soup", "rice", "fish", "cheese", "apples", "honey", "pasta"],
    ),
    "When was {} born?": ("{} was born in {}.", [str(year) for year in range(1950, 2000)]),
}


@dataclass(frozen=True)
class Question:
    text: str
    context: str
    answer: str
    place: int
    """Where the answer begins in the context."""


def questions(number: int, facts: int, kinds: int, seed: int) -> list[Question]:
    """Questions about one of `facts` facts on different people, in one context.

    kinds: how many of FACTS are in a context. Few make it hard: the kind alone does not tell where the answer is.
    """
    draw, made = random.Random(seed), []
    for _ in range(number):
        known = list(itertools.product(PEOPLE, draw.sample(list(FACTS), kinds)))
        chosen = [(*one, draw.choice(FACTS[one[1]][1])) for one in draw.sample(known, facts)]
        sentences = [FACTS[question][0].format(person, answer) for person, question, answer in chosen]
        place = draw.randrange(facts)
        person, question, answer = chosen[place]
        start = len(" ".join(sentences[:place])) + (place > 0) + sentences[place].index(answer, len(person))
        made.append(Question(question.format(person), " ".join(sentences), answer, start))
    return made


class Windows:
    """Questions and windows of their contexts, in batches with the tokens where answers start and end."""

    def __init__(self, tokenizer: Any, asked: Sequence[Question], batch: int) -> None:
        self.asked, self.batch = asked, batch
        found = tokenizer(
            [one.text for one in asked], [one.context for one in asked], truncation="only_second", max_length=LENGTH,
            stride=STRIDE, padding="max_length", return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        self.question: list[int] = found["overflow_to_sample_mapping"]
        # Characters of the context behind each token; tokens of anything else have none.
        self.offsets = [
            [span if part == 1 else None for span, part in zip(spans, found.sequence_ids(row), strict=True)]
            for row, spans in enumerate(found["offset_mapping"])
        ]
        self.inputs = {name: torch.tensor(found[name]) for name in tokenizer.model_input_names}
        spans = [self._answer(row) for row in range(len(self.question))]
        self.labels = dict(zip(("start_positions", "end_positions"), torch.tensor(spans).unbind(1), strict=True))

    def _answer(self, row: int) -> tuple[int, int]:
        """The first and the last token of the answer; both 0, the token [CLS], where the window does not hold it."""
        one = self.asked[self.question[row]]
        last = one.place + len(one.answer) - 1
        inside = [
            place for place, span in enumerate(self.offsets[row])
            if span is not None and span[0] <= last and span[1] > one.place
        ]  # fmt: skip
        return (inside[0], inside[-1]) if inside else (0, 0)

    def __len__(self) -> int:
        return -(-len(self.question) // self.batch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.question), self.batch):
            rows = slice(start, start + self.batch)
            yield {name: tensor[rows] for name, tensor in (self.inputs | self.labels).items()}


def answers(model: Callable[..., Any], windows: Windows) -> list[str]:
    """For each question the text of the best span, over all windows of its context."""
    best: dict[int, tuple[float, str]] = {}
    row = 0
    for batch in windows:
        with torch.no_grad():
            found = model(**{name: batch[name] for name in windows.inputs})
        for start, end in zip(found["start_logits"], found["end_logits"], strict=True):
            question, spans = windows.question[row], windows.offsets[row]
            in_context = torch.tensor([span is not None for span in spans])
            score = start[:, None] + end[None, :]
            allowed = torch.ones_like(score, dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
            score = score.masked_fill(~(allowed & in_context[:, None] & in_context), -torch.inf)
            place = int(score.argmax())
            first, last = spans[place // len(spans)], spans[place % len(spans)]
            assert first is not None and last is not None
            # A window without the answer has its largest logits at [CLS].
            margin = float(score.max() - start[0] - end[0])
            if question not in best or margin > best[question][0]:
                best[question] = margin, windows.asked[question].context[first[0] : last[1]]
            row += 1
    return [best[question][1] for question in range(len(windows.asked))]


def exact(found: Sequence[str], asked: Sequence[Question]) -> float:
    """Share of answers that are right to the letter."""
    return sum(text == one.answer for text, one in zip(found, asked, strict=True)) / len(asked)


def main(
    size: Size = "full",
    out: Out = Path("out/question_answering"),
    model: Annotated[Path | None, typer.Option(help="Folder of a BERT and its tokenizer; MiniLM without it.")] = None,
) -> None:
    """Answer questions with a BERT that is pruned, distilled and int8."""
    out, summary = folder(out), Summary()
    full = size == "full"
    module, tokenizer = encoder("AutoModelForQuestionAnswering", model, size)
    train = Windows(tokenizer, questions(4000 if full else 8, 6, 2, seed=1), 16 if full else 4)
    dev = Windows(tokenizer, questions(100 if full else 4, 8, 5, seed=2), 16 if full else 4)
    long = Windows(tokenizer, questions(40 if full else 2, 40, 5, seed=3), 16 if full else 4)

    def score(candidate: Any) -> float:
        return exact(answers(candidate, dev), dev.asked)

    tuned = graphopt.optimize(
        module, f"finetune{{{'epochs=1' if full else 'steps=1'} lr=1e-4}}",
        training=train, evaluate=score, measure=False, verbose=full,
    )  # fmt: skip
    small = graphopt.optimize(
        tuned,
        f"prune{{neurons=0.5}},distill{{steps={100 if full else 1} lr=1e-4}},"
        f"quantize{{scheme=static}},distill{{steps={20 if full else 1} lr=1e-5}}",
        training=train, calibration=train, calibration_steps=8, evaluate=score, verbose=full,
    )  # fmt: skip
    path = small.export(out / "model.onnx")
    deployed = Deployed(path)
    for name, windows in (("short", dev), ("long", long)):
        before, after = answers(tuned, windows), answers(deployed, windows)
        same = sum(one == other for one, other in zip(before, after, strict=True))
        summary[f"accuracy, {name} contexts"] = (
            f"{exact(before, windows.asked):.1%} -> {exact(after, windows.asked):.1%} exact answers, "
            f"{same} of {len(after)} spans are the same"
        )
    example = long.asked[0]
    print(f"{len(example.context)} characters of context\n{example.text} {answers(deployed, long)[0]}")
    summary.model(small, path, size)
    summary.show()


if __name__ == "__main__":
    program(main)
