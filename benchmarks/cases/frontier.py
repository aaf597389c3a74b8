"""How fast MiniLM gets for how much quality: neurons and heads pruned, then static int8, without training.

Every point starts from the float file that graphopt exports, and is timed against torch's own export of the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import graphopt
from benchmarks import trained
from benchmarks.case import Settings, checked, table, times
from benchmarks.loading import feeds, session
from benchmarks.networks import NETWORKS
from benchmarks.peers import BASELINE, exports
from benchmarks.speed import CONTROL, race, tables, write
from benchmarks.trained import Task
from graphopt.measure.timing import Ratio

NEURONS, HEADS = (0.0, 0.5, 0.7, 0.8), (0.0, 0.25)
SPEED, LOSS = 4.5, 0.5
"""One point has to be so many times as fast as the baseline, at this loss of Spearman x 100 at most."""
CALIBRATION = 768
"""Sentences of STS-B train."""


@dataclass(frozen=True)
class Point:
    """What is pruned, and what that brings and costs."""

    neurons: float
    heads: float
    speed: Ratio
    """Over the baseline: geometric mean over the shapes."""
    spearman: float
    bytes: int


def run(settings: Settings) -> bool:
    task, network = trained.minilm(settings, CALIBRATION), NETWORKS["minilm"]()
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        files = exports(network.traceable(), folder)
        source = graphopt.optimize(network.module, **network.options).export(folder / "float.onnx")
        shares = {f"{neurons:g},{heads:g}": (neurons, heads) for heads in HEADS for neurons in NEURONS}
        shares = {name: share for name, share in shares.items() if settings.chosen(name)}
        for name, share in shares.items():
            small = graphopt.optimize(
                source, pipeline(*share), threads=settings.threads, measure=True, calibration=task.calibration,
                **network.options,
            )  # fmt: skip
            files[name] = small.export(folder / f"{name}.onnx")
        found = race(files, network.shapes, settings)
        scores = {name: spearman(task, path, settings.threads) for name, path in files.items()}
        points = [
            Point(*share, found.found[name].overall, scores[name], files[name].stat().st_size)
            for name, share in shares.items()
        ]
        ranks = {name: f"{score:.2f}" for name, score in scores.items()}
        tables("frontier-shapes", "MiniLM, pruned and static int8", found, files, settings,
               columns=[("Spearman on STS-B dev", ranks)])  # fmt: skip
    fp32 = scores[BASELINE]
    shapes = ", ".join(network.shapes)
    rows = table(f"MiniLM pruned and static int8: times as fast at {shapes}, geometric mean", "share of neurons",
                 "of heads", "times as fast", f"Spearman (fp32: {fp32:.2f})", "against fp32", "MB")  # fmt: skip
    for point in points:
        loss = f"{point.spearman - fp32:+.2f}"
        rows.add_row(f"{point.neurons:g}", f"{point.heads:g}", times(point.speed), f"{point.spearman:.2f}", loss,
                     f"{point.bytes / 1e6:.1f}")  # fmt: skip
    rows.add_row(CONTROL, "", times(found.found[CONTROL].overall))
    best = max((point.speed.median for point in points if fp32 - point.spearman <= LOSS), default=0.0)
    verdict = checked(f"at a loss of {LOSS:g} at most: {best:.2f} times as fast (bound {SPEED:g})", best >= SPEED)
    settings.console.print(rows, verdict, sep="\n")
    write(settings, "frontier", {"fp32": fp32, "points": points})
    if settings.out is not None:
        plot(points, fp32, settings.out / "frontier.png")
    return best >= SPEED


def pipeline(neurons: float, heads: float) -> str:
    pruned = [f"{kind}={share}" for kind, share in (("neurons", neurons), ("heads", heads)) if share]
    return (f"prune{{{' '.join(pruned)}}}," if pruned else "") + "quantize{scheme=static}"


def spearman(task: Task, path: Path, threads: int) -> float:
    one = session(path, threads)
    return task.score(task.predict(lambda batch: one.run(None, feeds(one, batch))))


def plot(points: Sequence[Point], fp32: float, path: Path) -> None:
    """Quality against speed, one line per share of heads."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    for heads in dict.fromkeys(point.heads for point in points):
        line = [point for point in points if point.heads == heads]
        axes.plot([one.speed.median for one in line], [one.spearman for one in line], "o-", label=f"heads: {heads:g}")
        for one in line:
            axes.annotate(f"{one.neurons:g}", (one.speed.median, one.spearman), (4, 4), textcoords="offset points")
    axes.axhline(fp32, color="black", linewidth=0.8, linestyle="--")
    axes.axvline(SPEED, color="grey", linewidth=0.8, linestyle=":")
    axes.axhline(fp32 - LOSS, color="grey", linewidth=0.8, linestyle=":")
    axes.set(title="MiniLM, static int8; numbers are shares of neurons that went", ylabel="Spearman (dashed: fp32)",
             xlabel="times as fast as torch.onnx.export")  # fmt: skip
    axes.legend(title="share that went")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
