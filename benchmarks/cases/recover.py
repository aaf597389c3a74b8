"""What training brings back after compression, on real networks and in one call each.

The best weights are chosen on data that is set aside from the training data; other data judges the exported file, in
ONNX Runtime. `--only minilm-2.9x` runs one recipe. How fast MiniLM's are is measured by the case recover_speed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from benchmarks import loaders, models, sentences, trained
from benchmarks.case import Settings, checked
from benchmarks.loading import feeds, session
from benchmarks.networks import NETWORKS
from benchmarks.peers import BASELINE, exports
from benchmarks.speed import write
from benchmarks.trained import Run, Task
from graphopt.numerics import metrics
from graphopt.passes import REGISTRY
from graphopt.pipeline.instruments import Instrument
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.text import parse

SEEDS = (0, 1, 2)

INT8 = "quantize{scheme=static}"


@dataclass(frozen=True)
class Recipe:
    """A pipeline that trains, on a task."""

    name: str
    task: Task
    passes: str
    """With SEED in place of the seed, and CACHE in place of a folder."""
    bound: float | None
    """The least score; None where none is set."""
    training: Any
    share_of: tuple[str, float] | None = None
    """Another recipe, and the least share of its score, in place of a bound."""
    evaluate: Callable[[Any], float] | None = None
    seeds: Sequence[int] = (0,)
    speed: float | None = None
    """The least speed over `INT8` of the same model (the case recover_speed)."""
    others: Mapping[str, Callable[[Run], float]] = field(default_factory=dict)
    """Further figures of the exported file."""


@dataclass(frozen=True)
class Row:
    """What became of a recipe with one seed."""

    recipe: str
    seed: int
    before: float
    """The score without the passes that train."""
    score: float
    trained: float | None
    """The metric that chose the weights, of what was trained; None without one."""
    shipped: float | None
    """The same of what ships."""
    minutes: float
    """Of CPU time, of the whole call."""
    others: dict[str, float]


class Evaluations(Instrument):
    """Prints each evaluation of a training."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.began = settings, time.monotonic()

    def trained(self, line: Mapping[str, Any]) -> None:
        if "metric" in line:
            text = f"  {time.monotonic() - self.began:5.0f} s, step {line['step']}: {line['metric']:.5g}"
            self.settings.console.print(text, highlight=False)


def run(settings: Settings) -> bool:
    rows, good = list[Row](), True
    with tempfile.TemporaryDirectory() as folder:
        for recipe in recipes(settings):
            found, before = list[Row](), untrained(recipe, settings, Path(folder))
            for seed in recipe.seeds:
                found.append(one(recipe, seed, before, settings, Path(folder)))
                settings.console.print(line(found[-1], recipe, rows), highlight=False)
            good = good and all(holds(row, recipe, rows) for row in found)
            rows += found
            write(settings, "recover", {"rows": rows})
    return good


def without_training(recipe: Recipe) -> list[Pass]:
    """The passes of a recipe but for those that train."""
    return [one for one in parse(recipe.passes.replace("SEED", "0"), REGISTRY).passes if not one.trains]


def untrained(recipe: Recipe, settings: Settings, folder: Path) -> float:
    """The score of the same passes without those that train."""
    passes = without_training(recipe)
    small = graphopt.optimize(
        recipe.task.model, passes, example_inputs=recipe.task.calibration[:1], calibration=recipe.task.calibration,
        threads=settings.threads,
    )  # fmt: skip
    run = in_onnxruntime(small.export(folder / f"{recipe.name}-untrained.onnx"), settings.threads)
    return recipe.task.score(recipe.task.predict(run))


def one(recipe: Recipe, seed: int, before: float, settings: Settings, folder: Path) -> Row:
    """Train, export, and judge the file. before: the score without training."""
    passes = recipe.passes.replace("SEED", str(seed)).replace("CACHE", f'"{folder / "teacher"}"')
    settings.console.print(f"{recipe.name}, seed {seed}: {passes.replace(str(folder), '')}", highlight=False)
    began = time.process_time()
    small = graphopt.optimize(
        recipe.task.model, passes, example_inputs=recipe.task.calibration[:1], calibration=recipe.task.calibration,
        training=recipe.training, evaluate=recipe.evaluate, threads=settings.threads,
        instruments=[Evaluations(settings)],
    )  # fmt: skip
    minutes = (time.process_time() - began) / 60
    file = small.export(folder / f"{recipe.name}-{seed}.onnx")
    for note in (note for record in small.report.passes for note in record.notes if note.startswith("amp=")):
        settings.console.print(f"  {note}", highlight=False)
    run = in_onnxruntime(file, settings.threads)
    metric = small.report.shipped
    score = recipe.task.score(recipe.task.predict(run))
    others = {name: judge(run) for name, judge in recipe.others.items()}
    trained, shipped = (None, None) if metric is None else (metric.trained, metric.shipped)
    return Row(recipe.name, seed, before, score, trained, shipped, minutes, others)


def least(recipe: Recipe, rows: Sequence[Row]) -> float | None:
    """The bound of a recipe: its own, or a share of what another one reached; None without either."""
    if recipe.share_of is None:
        return recipe.bound
    other, share = recipe.share_of
    reached = [row.score for row in rows if row.recipe == other]
    return share * max(reached) if reached else None


def holds(row: Row, recipe: Recipe, rows: Sequence[Row]) -> bool:
    bound = least(recipe, rows)
    return bound is None or row.score >= bound


def line(row: Row, recipe: Recipe, rows: Sequence[Row]) -> Any:
    others = "".join(f"; {name} {value:.4f}" for name, value in row.others.items())
    equal = "" if row.trained is None else f"; chosen by {row.trained:.5g} as trained, {row.shipped:.5g} as shipped"
    bound = least(recipe, rows)
    aim = "no bound" if bound is None else f"bound {bound:.4g}"
    text = (f"  {recipe.task.metric}: {row.before:.4g} -> {row.score:.4g} ({aim}){equal}{others}; "
            f"{row.minutes:.1f} CPU minutes")  # fmt: skip
    return checked(text, holds(row, recipe, rows))


def in_onnxruntime(file: Path, threads: int) -> Run:
    opened = session(file, threads)
    return lambda batch: opened.run(None, feeds(opened, batch))


def recipes(settings: Settings) -> Iterator[Recipe]:
    """All recipes that are chosen, by name."""
    groups: dict[str, Callable[[Settings], Iterator[Recipe]]] = {
        "minilm": minilm, "sst2": sst2, "resnet20": resnet20, "stories": stories, "file": files,
    }  # fmt: skip
    for prefix, make in groups.items():
        if not settings.only or any(name.startswith(prefix) for name in settings.only):
            yield from (recipe for recipe in make(settings) if settings.chosen(recipe.name) or prefix in settings.only)


# --- sentence embeddings -------------------------------------------------------------------------------------------

MINILM = {
    "minilm-2.0x": ("layers=0.5 neurons=0.25", 86.9, 2.0),
    "minilm-2.3x": ("layers=0.5 neurons=0.4", 86.5, 2.3),
    "minilm-2.9x": ("layers=0.5 neurons=0.65", 86.2, 2.9),
    "minilm-3.4x": ("layers=0.5 neurons=0.75 heads=0.17", 85.0, 3.4),
    "minilm-4.3x": ("layers=0.59 neurons=0.75 heads=0.25", 84.4, 4.3),
}
"""What goes, the least Spearman, and the least speed over int8."""

MINILM_STEPS = 2400
AMP_STEPS = 200
ASIDE = 500
"""Pairs of STS-B train that choose the best weights; their sentences are not trained on."""


def minilm(settings: Settings) -> Iterator[Recipe]:
    """The teacher's embeddings of sentences without labels."""
    task, tokens = trained.minilm(settings, 768), sentences.tokenizer()
    aside, kept = sentences.parted(sentences.read_pairs(settings.required("stsb", "sts-train.csv")), ASIDE)
    texts = sorted({*kept.first, *kept.second} - {*aside.first, *aside.second})
    texts += [text for text, _ in labelled(settings.required("sst2", "train.tsv"))]
    loader = loaders.Sentences(tokens, texts)
    reviews = sentences.batches(tokens, [text for text, _ in labelled(settings.required("sst2", "dev.tsv"))], 64)
    expected = [task.read(task.run_module(batch)[0], batch) for batch in reviews]

    def kinship(run: Run) -> float:
        """The cosine to the teacher's embeddings of sentences of another kind."""
        found = [task.read(torch.as_tensor(run(batch)[0]), batch) for batch in reviews]
        return trained.cosine(torch.cat(expected), torch.cat(found))

    common = "outputs=last_hidden_state cosine=10 similarity=10 seed=SEED"
    for amp in ("auto", "off", "bfloat16"):
        passes = f"prune{{neurons=0.9 heads=0.5}},distill{{steps={AMP_STEPS} lr=5e-4 amp={amp} cache=CACHE {common}}}"
        yield Recipe(f"minilm-amp-{amp}", task, passes, None, loader)
    trained_on = f"cache=CACHE amp=bfloat16 freeze=embedding {common}"
    for name, (shares, bound, speed) in MINILM.items():
        passes = (
            f"prune{{{shares}}},"
            f"distill{{steps={MINILM_STEPS} lr=5e-4 evaluate_every=400 {trained_on}}},{INT8},"
            f"distill{{steps=100 lr=5e-5 evaluate_every=50 {trained_on}}}"
        )
        yield Recipe(name, task, passes, bound, loader, None, similarities(tokens, aside, task), SEEDS, speed,
                     {"cosine to the teacher on SST-2 dev": kinship})  # fmt: skip


def similarities(tokens: Any, pairs: sentences.Pairs, task: Task) -> Callable[[Any], float]:
    """Spearman x 100 of a model on some pairs."""
    texts = [*pairs.first, *pairs.second]
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    back = torch.tensor(order).argsort()
    batches = sentences.batches(tokens, [texts[index] for index in order], 64)

    def score(model: Any) -> float:
        with torch.inference_mode():
            rows = [task.read(models.tensors(model(**batch))[0], batch) for batch in batches]
        return sentences.spearman(pairs, *torch.cat(rows)[back].chunk(2))

    return score


# --- classification of sentences -----------------------------------------------------------------------------------


class Classifier(nn.Module):
    """MiniLM with a linear layer on the mean of the tokens."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.encoder, self.classifier = models.minilm(), nn.Linear(384, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return {"logits": self.classifier((hidden * weights).sum(1) / weights.sum(1))}


def sst2(settings: Settings) -> Iterator[Recipe]:
    """The teacher is trained in the same call, by finetune."""
    tokens = sentences.tokenizer()
    rows, dev = (labelled(settings.required("sst2", name)) for name in ("train.tsv", "dev.tsv"))
    aside, kept = rows[::10], [row for place, row in enumerate(rows) if place % 10]
    torch.manual_seed(0)
    model = Classifier().eval()
    batches, labels = sentences.batches(tokens, [text for text, _ in dev], 64), torch.tensor([one for _, one in dev])
    choosing = sentences.batches(tokens, [text for text, _ in aside], 64)
    chosen = torch.tensor([label for _, label in aside])

    def accuracy(model: Any) -> float:
        with torch.inference_mode():
            logits = torch.cat([models.tensors(model(**batch))[0] for batch in choosing])
        return 100 * float((logits.argmax(-1) == chosen).double().mean())

    task = Task(
        "MiniLM with a classifier", model, sentences.batches(tokens, [text for text, _ in kept[::18]], 32), batches,
        lambda logits, batch: logits, "accuracy %, SST-2 dev",
        lambda rows: 100 * float((rows.argmax(-1) == labels).double().mean()),
    )  # fmt: skip
    loader = loaders.Sentences(tokens, [text for text, _ in kept], [label for _, label in kept])
    teacher = "finetune{epochs=3 lr=5e-5 evaluate_every=100 seed=SEED}"
    yield Recipe("sst2-teacher", task, teacher, None, loader, evaluate=accuracy)
    student = (
        f"{teacher},prune{{neurons=0.87 heads=0.42}},"
        "distill{epochs=5 lr=3e-4 alpha=0.2 temperature=2 hidden=1 evaluate_every=100 seed=SEED},"
        f"{INT8},distill{{steps=100 lr=3e-5 alpha=0.2 temperature=2 evaluate_every=50 seed=SEED}}"
    )
    yield Recipe("sst2", task, student, None, loader, ("sst2-teacher", 0.98), accuracy)


def labelled(path: Path) -> list[tuple[str, int]]:
    """Sentences with their labels, split on tabs."""
    rows = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [(text, int(label)) for text, label in rows]


# --- images --------------------------------------------------------------------------------------------------------


def resnet20(settings: Settings) -> Iterator[Recipe]:
    """CIFAR-10, on 10,000 of the images that the network was trained on before."""
    task = trained.resnet(settings, 20)
    with np.load(settings.required("cifar10", "train10k.npz")) as held:
        images, labels = torch.from_numpy(held["x"]).permute(0, 3, 1, 2), torch.from_numpy(held["y"]).long()
    loader = loaders.Images(images, labels, trained.normalized(settings))
    for name, (passes, bound) in RESNET20.items():
        yield Recipe(name, task, passes, bound, loader, seeds=SEEDS)


RESNET20 = {
    "resnet20-int8": (f"{INT8},distill{{steps=150 lr=1e-4 seed=SEED}}", 91.6),
    "resnet20-2:4": (
        "sparsify{pattern=2:4 criterion=sparsegpt},"
        "distill{sr_ste=2e-4 epochs=8 lr=1e-3 temperature=4 seed=SEED}", 91.0,
    ),
    "resnet20-w4a4": (
        "quantize{scheme=static bits=4 activation_bits=4},"
        "distill{epochs=4 lr=2e-4 temperature=4 learn_scales=true seed=SEED}", 91.42,
    ),
    "resnet20-channels": ("prune{channels=0.5},distill{epochs=12 lr=2e-3 hidden=1 seed=SEED}", 86.9),
}  # fmt: skip


# --- ONNX files without their source -------------------------------------------------------------------------------


def files(settings: Settings) -> Iterator[Recipe]:
    """A detector of faces from the corpus, on images that are none of its own, and MiniLM as torch exports it."""
    path = settings.required("onnx_corpus", "ultraface__version-slim-320_simplified.onnx")
    with np.load(settings.required("cifar10", "calibration.npz")) as held:
        small = torch.from_numpy(held["x"][:384]).permute(0, 3, 1, 2).float()
    images = F.interpolate(small, size=(240, 320), mode="bilinear") / 128 - 1
    batches = [{"input": image.unsqueeze(0)} for image in images]
    train, held_out = batches[:320], batches[320:]
    whole = session(path, settings.threads)
    expected = torch.cat([torch.from_numpy(whole.run(None, feeds(whole, batch))[0]) for batch in held_out])
    task = Task(
        "UltraFace", path, train[:16], held_out, lambda scores, batch: scores, "SQNR in dB of the scores",
        lambda rows: metrics.sqnr(expected, rows),
    )  # fmt: skip
    passes = "prune{channels=0.3},distill{steps=120 accumulate=8 lr=1e-3 seed=SEED}"
    yield Recipe("file-ultraface", task, passes, None, loaders.Shuffled(train))
    minilm_task, tokens = trained.minilm(settings, 768), sentences.tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        source = exports(NETWORKS["minilm"]().traceable(), Path(folder))[BASELINE]
        hidden = session(source, settings.threads).get_outputs()[0].name
        texts = [text for text, _ in labelled(settings.required("sst2", "train.tsv"))]
        texts += sentences.read_pairs(settings.required("stsb", "sts-train.csv")).first
        passes = f"prune{{neurons=0.8 heads=0.25}},distill{{steps=400 lr=5e-4 outputs={hidden} seed=SEED}}"
        yield Recipe("file-minilm", replace(minilm_task, model=source), passes, None, loaders.Sentences(tokens, texts))


# --- a language model ----------------------------------------------------------------------------------------------


def stories(settings: Settings) -> Iterator[Recipe]:
    """Text that the model itself has written."""
    task, ids = trained.stories(settings), trained.samples(settings, 1024)
    reference = task.score(task.predict(lambda batch: task.run_module(batch)))
    loader = loaders.Shuffled([{"ids": part} for part in ids.reshape(-1, 16, ids.shape[1])])
    for name, (passes, rise) in STORIES.items():
        yield Recipe(name, task, passes, reference - rise, loader, seeds=SEEDS[:1])


STORIES = {
    "stories-int4": ("quantize{scheme=weight-only bits=4 block=32},distill{epochs=8 lr=3e-4 seed=SEED}", 0.020),
    "stories-pruned": ("prune{heads=0.25 neurons=0.25},distill{epochs=16 lr=1e-3 seed=SEED}", 0.10),
}
