"""How fast the recipes of `recover` for MiniLM make it: speed is decided by what goes, so that nothing is trained."""

from __future__ import annotations

import tempfile
from pathlib import Path

import graphopt
from benchmarks.case import Settings, checked, table, times
from benchmarks.cases.recover import INT8, minilm, without_training
from benchmarks.networks import NETWORKS
from benchmarks.peers import BASELINE, exports
from benchmarks.speed import race, tables, write
from graphopt.pipeline import Pass


def run(settings: Settings) -> bool:
    """All recipes against torch's own export and the int8 of the whole model, in one run."""
    network = NETWORKS["minilm"]()
    recipes = {one.name: one for one in minilm(settings) if one.speed is not None and settings.chosen(one.name)}
    calibration = next(iter(recipes.values())).task.calibration
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        found = exports(network.traceable(), folder)
        pipelines: dict[str, str | list[Pass]] = {"int8": INT8}
        pipelines |= {one.name: without_training(one) for one in recipes.values()}
        for name, passes in pipelines.items():
            small = graphopt.optimize(
                network.module, passes, calibration=calibration, measure=True, threads=settings.threads,
                **network.options,
            )  # fmt: skip
            found[name] = small.export(folder / f"{name}.onnx")
        raced = race(found, network.shapes, settings)
        tables("recover_speed", "MiniLM, pruned and in static int8", raced, found, settings)
    over_int8 = {name: raced.found[name].overall.median / raced.found["int8"].overall.median for name in recipes}
    rows = table("times as fast, geometric mean over the shapes", "recipe", "over fp32", "over int8", "bound")
    for name, recipe in recipes.items():
        bound = recipe.speed or 0.0
        over = checked(f"{over_int8[name]:.2f}", over_int8[name] >= bound)
        rows.add_row(name, times(raced.found[name].overall), over, f"{bound:g}")
    rows.add_row("int8", times(raced.found["int8"].overall), "1", "")
    rows.add_row(BASELINE, "1", "", "")
    settings.console.print(rows)
    write(settings, "recover_speed", {"over_int8": over_int8})
    return all(over_int8[name] >= (recipe.speed or 0.0) for name, recipe in recipes.items())
