"""What a report's tables and notes say, cell by cell and line by line; text, terminal and html draw them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.analysis.propagation import LOST
from graphopt.errors import few
from graphopt.measure.timing import geometric_mean, slower_than
from graphopt.numerics import metrics
from graphopt.report import figures
from graphopt.report.agreements import Agreement
from graphopt.report.declines import Reason
from graphopt.report.diff import GraphDiff
from graphopt.report.records import PassRecord, Race, Report

if TYPE_CHECKING:
    from graphopt.analysis.branches import Branch
    from graphopt.analysis.groups import Group
    from graphopt.analysis.propagation import Propagation
    from graphopt.measure.timing import Ratio
    from graphopt.report.records import BenchResult, Comparison, Damage, Sensitivity

SITES = 3
"""Declined sites that are named for each reason."""

Rows = list[tuple[str, ...]]
"""A table; the first row is its header."""

OPTIONAL = "nodes", "parameters", "FLOPs", "sites", "seconds"
"""Columns of `pass_rows` that a narrow terminal does without, the first to go first."""


# --- the report of an optimization ---------------------------------------------------------------------------------


def headline(report: Report) -> str:
    """One line: how much smaller, how much faster, and how close the outputs are; what was not measured says so."""
    return ", ".join(filter(None, [_smaller(report), faster(report.speed), closeness(report), _metric(report)]))


def rest(report: Report) -> list[str]:
    """What a summary says under its table: the warnings, and what else the report holds."""
    counts = {
        "note": len(remarks(report)),
        "declined site": sum(len(record.declined) for record in report.passes),
        "reverted site": len(report.reverted),
        "choice": len(report.choices),
        "kernel": sum(report.kernels.values()),
    }
    named = [f"{count} {what}{'s' if count > 1 else ''}" for what, count in counts.items() if count]
    warnings = [note for note in remarks(report) if is_warning(note)]
    return [*warnings, *([f"more in .report: {', '.join(named)}"] if named else [])]


def _smaller(report: Report) -> str:
    before, after = report.cost_before.bytes, report.cost_after.bytes
    if not (before and after) or 0.995 < before / after < 1.005:
        return "no smaller"
    if after < before:
        return f"{figures.times(before / after)} times smaller"
    return f"{figures.times(after / before)} times as large"


def faster(speed: Sequence[Mapping[str, Any]]) -> str:
    """How many times as fast as the input: at the one example shape, or at the slowest and the fastest of several.

    speed: "median", "low", "high" and "steady" by shape, as in `Report.speed`.
    """
    if not speed:
        return "speed not measured"
    ordered = sorted(speed, key=lambda one: one["median"])
    slower = sum(one["high"] < 1 for one in ordered)
    if all(one["low"] == one["high"] == 1 for one in ordered):  # it is the input itself
        return "as fast as the input"
    if len(ordered) > 1:
        words = f"{' to '.join(_times(one) + _bounds(one) for one in (ordered[0], ordered[-1]))} times as fast"
        words += f" over {len(ordered)} shapes"
    else:
        words = f"{_times(ordered[0])} times as fast{_bounds(ordered[0])}"
    if slower:
        return f"slower{f' at {slower}' if len(ordered) > 1 else ''}: {words}"
    if all(one["low"] > 1 for one in ordered):
        return words
    return f"perhaps {'faster' if ordered[0]['median'] > 1 else 'slower'}: {words}"


def _times(one: Mapping[str, Any]) -> str:
    return f"{'' if one['steady'] else '~'}{figures.times(one['median'])}"


def _bounds(one: Mapping[str, Any]) -> str:
    return f" [{figures.times(one['low'])}, {figures.times(one['high'])}]" if math.isfinite(one["high"]) else ""


def closeness(report: Report) -> str:
    """How close the deployed outputs are to the original's: the least cosine."""
    if not report.agreement:
        return "outputs not compared"
    if all(one.sqnr == math.inf for one in report.agreement):
        return "outputs equal"
    cosine = metrics.worst(one.cosine for one in report.agreement)
    return f"cosine {cosine:.4f}"


def _metric(report: Report) -> str:
    found = report.shipped
    return "" if found is None else f"metric {found.shipped:.4g} of {found.original:.4g}"


def cost_rows(report: Report) -> list[tuple[str, str]]:
    """Size, parameters and FLOPs before and after; without a header."""
    before, after = report.cost_before, report.cost_after
    smaller = f" ({before.bytes / after.bytes:.2f} times smaller)" if 0 < after.bytes < before.bytes else ""
    rows = [
        ("size", f"{figures.size(before.bytes)} -> {figures.size(after.bytes)}{smaller}"),
        ("parameters", f"{figures.count(before.parameters)} -> {figures.count(after.parameters)}"),
    ]
    if before.flops is not None and after.flops is not None:
        rows.append(("FLOPs", f"{figures.count(before.flops)} -> {figures.count(after.flops)}"))
    return rows


def remarks(report: Report) -> list[str]:
    """The notes of the whole run, then those of each pass."""
    return [*report.notes, *(f"{record.name}: {note}" for record in report.passes for note in record.notes)]


def is_warning(remark: str) -> bool:
    """Whether one of `remarks` warns, of the whole run or of a pass."""
    return re.match(r"([\w-]+: )?warning: ", remark) is not None


def pass_rows(report: Report) -> Rows:
    """One row per pass; SQNR and cosine are those of the worst output."""
    header = "pass", "sites", "changed", "declined", "nodes", "FLOPs", "parameters", "size", "SQNR", "cosine", "seconds"
    return [header, *(_pass_row(record) for record in report.passes)]


def _pass_row(record: PassRecord) -> tuple[str, ...]:
    has_sites = bool(record.eligible)
    return (
        figures.shortened(record.name, 16),
        str(len(record.eligible)) if has_sites else "-",
        str(record.changed),
        str(len(record.declined)) if has_sites or record.declined else "-",
        str(record.nodes_after),
        "-" if record.cost_after.flops is None else figures.count(record.cost_after.flops),
        figures.count(record.cost_after.parameters),
        figures.size(record.cost_after.bytes),
        figures.decibels(min(one.sqnr for one in record.agreement)) if record.agreement else "-",
        figures.cosine(min(one.cosine for one in record.agreement)) if record.agreement else "-",
        f"{record.seconds:.2f}",
    )


def left_out(names: Sequence[str]) -> str:
    """What a table says below, where columns are left out."""
    return f"too narrow for: {', '.join(names)}"


def sites(record: PassRecord) -> str:
    """How much a pass changed: 3 of 12 sites, or 5 changes of the whole graph."""
    if record.eligible:
        return f"{record.changed} of {len(record.eligible)} sites"
    return "1 change" if record.changed == 1 else f"{record.changed} changes"


def declined(reasons: Mapping[str, str]) -> list[tuple[str, int, str]]:
    """Of reasons by site: (reason, how many sites, the first few names), the most frequent reason first."""
    by_reason: dict[str, list[str]] = {}
    for label, reason in reasons.items():
        by_reason.setdefault(str(reason), []).append(label)
    ranked = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    return [(reason, len(labels), few(labels, SITES)) for reason, labels in ranked]


def agreement_rows(report: Report) -> Rows:
    """One row per output; where the example inputs have several shapes, one for each of them."""
    if len(report.agreement_by_shapes) < 2:
        pooled = any(one.pooled is not None for one in report.agreement)
        return [("output", *_figures(pooled)), *((one.output, *_agreement(one, pooled)) for one in report.agreement)]
    return _agreements(report.agreement_by_shapes, "inputs", [one.output for one in report.agreement])


def length_rows(report: Report) -> Rows:
    """One row per output and length of the calibration texts."""
    found = report.agreement_by_length
    return _agreements(found, "tokens", dict.fromkeys(one.output for several in found.values() for one in several))


def _agreements(found: Mapping[str, Sequence[Agreement]], title: str, outputs: Iterable[str]) -> Rows:
    """One row per output and what it is compared on, output by output."""
    pooled = any(one.pooled is not None for several in found.values() for one in several)
    rows: Rows = [("output", title, *_figures(pooled))]
    return rows + [
        (output, what, *_agreement(one, pooled))
        for output in outputs for what, several in found.items() for one in several if one.output == output
    ]  # fmt: skip


def _figures(pooled: bool) -> tuple[str, ...]:
    return ("SQNR", *(["pooled"] if pooled else []), "cosine", "max error")


def _agreement(one: Agreement, pooled: bool) -> tuple[str, ...]:
    mean = "-" if one.pooled is None else figures.decibels(one.pooled)
    return figures.decibels(one.sqnr), *([mean] if pooled else []), figures.cosine(one.cosine), f"{one.max_error:.3g}"


def kernel_rows(report: Report) -> Rows:
    """One row per kernel."""
    return [("kernel", "number"), *((kind, str(number)) for kind, number in report.kernels.items())]


def race_rows(race: Race) -> Rows:
    """One row per entrant, the fastest first, then those that were not timed."""
    rows: Rows = [("engine", "model", "floats", "ms", "times as fast", "SQNR", "outcome")]
    order = sorted(range(len(race.entrants)), key=lambda place: -(race.entrants[place].speed or (0.0,))[0])
    for place in order:
        one = race.entrants[place]
        speed = "-" if one.speed is None else figures.interval(*one.speed, steady=race.steady)
        sqnr = "-" if one.sqnr is None else figures.decibels(one.sqnr)
        outcome = one.why_out or ("taken" if place == race.winner else "")
        times = " / ".join(f"{each:.3g}" for each in one.milliseconds) or "-"
        rows.append((one.engine, one.model, one.precision, times, speed, sqnr, outcome))
    return rows


def race_notes(race: Race) -> list[str]:
    """What the columns of `race_rows` are."""
    if race.baseline is None:
        return ["nothing was measured"]
    base = race.entrants[race.baseline]
    notes = [f"ms at {' / '.join(race.shapes)}; times as fast as {base.engine}, {base.model}"]
    if race.least_sqnr is not None:
        notes.append(f"only what reaches {figures.decibels(race.least_sqnr)} can win")
    return notes


def roofline_rows(report: Report) -> Rows:
    """One row per example shape; the classes of products are columns."""
    kinds = list(dict.fromkeys(kind for one in report.roofline for kind in one.least))
    rows: Rows = [("inputs", "ms", *(f"{kind} at least, ms" for kind in kinds), "share of the limit")]
    return rows + [
        (one.shapes, *map(figures.milliseconds, [one.seconds, *(one.least.get(kind, 0.0) for kind in kinds)]),
         figures.share(one.share))
        for one in report.roofline
    ]  # fmt: skip


def speed_rows(report: Report) -> Rows:
    """One row per example shape."""
    rows: Rows = [("inputs", "times as fast", "rounds")]
    return rows + [
        (one["shapes"], figures.interval(one["median"], one["low"], one["high"], one["steady"]), str(one["rounds"]))
        for one in report.speed
    ]


def reverted(report: Report) -> list[str]:
    """One line per site."""
    return [f"{site}: {reason}" for site, reason in report.reverted.items()]


def choices(report: Report) -> list[str]:
    """One line for each choice that changed or declined a site, with what was measured for each kind of site."""
    lines = []
    for choice in report.choices:
        details = [f"sites {choice['sites']}"] if choice["sites"] else []
        details += [f"declined {n} x {reason}: {names}" for reason, n, names in declined(choice["declined"])]
        details += [measurement(measured) for measured in choice.get("measured", ())]
        if details:
            lines.append(f"{choice['rule']}: {'; '.join(details)}")
    return lines


def measurement(measured: Mapping[str, Any]) -> str:
    """The form that some sites take, how fast each form is over the first, and the forms that were dropped."""
    alike = f" and {measured['sites'] - 1} like it" if measured["sites"] > 1 else ""
    line = f"{measured['site']}{alike} as {measured['form']}"
    ratios = list(measured["ratios"].items())
    line += f" ({figures.ratios(dict(ratios[1:]))} over {ratios[0][0]})" if ratios else ""
    line += "" if measured["sure"] else ", by the static order as the machine was unsteady"
    return line + "".join(f", {form} dropped: {reason}" for form, reason in measured["dropped"].items())


# --- sensitivity and comparison ------------------------------------------------------------------------------------


def sensitivity_rows(found: Sensitivity) -> Rows:
    """One row per site, the most harmful first: all figures of one setting, or the main ones of several."""
    sites = list(dict.fromkeys(row.site for row in found.ranking()))
    damages = {site: found.of(site) for site in sites}
    if len(found.settings) > 1:
        header = "site", *(f"setting {number}" for number in range(1, len(found.settings) + 1))
        return [header, *((site, *(_brief(damages[site].get(one)) for one in found.settings)) for site in sites)]
    has_metric = found.baseline is not None
    rows: Rows = [("site", "SQNR", "cosine", "worst batch", *(["metric"] if has_metric else []))]
    for site in sites:
        damage = damages[site][found.settings[0]]
        metric = [f"{damage.metric:.5g}"] if damage.metric is not None else []
        cosines = figures.cosine(damage.cosine), figures.cosine(damage.worst_cosine)
        rows.append((site, figures.decibels(damage.sqnr), *cosines, *metric))
    return rows


def sensitivity_notes(found: Sensitivity) -> list[str]:
    """What the columns of `sensitivity_rows` are, and which sites the settings declined."""
    over = "1 batch" if found.batches == 1 else f"{found.batches} batches"
    notes = [f"what changing one site alone does to the worst output, over {over}"]
    if found.baseline is not None:
        notes.append(f"metric of the unchanged model: {found.baseline:.5g}; more is better")
    if len(found.settings) > 1:
        notes += [f"setting {number}: {setting}" for number, setting in enumerate(found.settings, 1)]
    else:
        notes.append(f"setting: {found.settings[0]}")
    for setting in found.settings:
        refused = [row for row in found.rows if row.setting == setting and row.damage is None]
        reasons = {row.site: "; ".join(row.declined) for row in refused}
        notes += [f"{setting} declined {number} x {reason}: {names}" for reason, number, names in declined(reasons)]
    return notes


def _brief(damage: Damage | None) -> str:
    if damage is None:
        return "-"
    return figures.decibels(damage.sqnr) + (f"  {damage.metric:.5g}" if damage.metric is not None else "")


def comparison_rows(found: Comparison) -> Rows:
    """One row per output."""
    rows: Rows = [("output", "SQNR", "cosine", "max error", "top-1")]
    return rows + [
        (one.output, figures.decibels(one.sqnr), figures.cosine(one.cosine), f"{one.max_error:.3g}",
         figures.share(one.top1))
        for one in found.outputs
    ]  # fmt: skip


def site_rows(found: Propagation) -> Rows:
    """One row per site that both models have, in the order of the graph."""
    rows: Rows = [("site", "op", "SQNR", "cosine")]
    return rows + [
        (one.site, one.kind, figures.decibels(one.sqnr) if one.alike else f"({figures.decibels(one.sqnr)})",
         figures.cosine(one.cosine))
        for one in found.sites
    ]  # fmt: skip


def comparison_notes(found: Comparison) -> list[str]:
    """How many batches; the first site whose signal is lost, and the site that adds most noise."""
    batches = "1 batch" if found.batches == 1 else f"{found.batches} batches; SQNR and cosine are of the worst"
    notes, inside = [f"over {batches}"], found.propagation
    notes += [f"not compared on {number} of them, as its size depends on data and differs: {output}"
              for output, number in found.left_out.items()]  # fmt: skip
    if inside is None:
        return notes
    lost, worst = inside.lost, inside.noisiest
    below = f"below {LOST:g} dB"
    if lost is None:
        notes.append(f"no site is {below}")
    else:
        notes.append(f"first {below}: {lost.site}, {figures.decibels(lost.sqnr)}")
    if worst is not None:
        read = "it reads no noise"
        if math.isfinite(worst.before):
            read = f"what it reads has {figures.decibels(worst.before)}"
        notes.append(f"most noise is added by {worst.site}: {read}, its result {figures.decibels(worst.sqnr)}")
    if unlike := [one.site for one in inside.sites if not one.alike]:
        notes.append("in brackets: the sites that read it agree, so its channels are only scaled, shifted or in "
                     f"another order, which is no fault: {few(unlike, SITES)}")  # fmt: skip
    unpaired = {site: Reason.of(why) for site, why in inside.unpaired.items()}
    return notes + [f"not compared, {n} x {reason}: {names}" for reason, n, names in declined(unpaired)]


# --- timings -------------------------------------------------------------------------------------------------------


def bench_rows(result: BenchResult) -> Rows:
    """One row per shape: the baseline's p50, and how many times faster each candidate is, with the 95% interval."""
    candidates = list(result.rows[0][1])
    baseline = next(iter(result.rows[0][1][candidates[0]].seconds))
    rows: Rows = [("inputs", f"{baseline}, ms", *candidates)]
    for shapes, ratios in result.rows:
        seconds = ratios[candidates[0]].seconds[baseline][0]
        rows.append((shapes, figures.milliseconds(seconds), *(_ratio(ratios[name]) for name in candidates)))
    if len(result.rows) > 1:
        means = [geometric_mean(ratios[name].median for _, ratios in result.rows) for name in candidates]
        rows.append(("geometric mean", "", *(f"{mean:.2f}" for mean in means)))
    return rows


def bench_headline(result: BenchResult) -> str:
    """One line: how many times as fast as the baseline the first candidate is."""
    return faster([vars(next(iter(ratios.values()))) for _, ratios in result.rows])


def bench_notes(result: BenchResult) -> list[str]:
    """How to read the rows, and where a candidate is slower beyond doubt."""
    ratios = [ratio for _, row in result.rows for ratio in row.values()]
    unsteady = ["~ the machine kept changing speed: the figure is of the steadiest rounds, which are few"]
    losses = [f"{name} is slower than the baseline at {shapes}"
              for shapes, row in result.rows for name, ratio in row.items() if slower_than(ratio)]  # fmt: skip
    return [
        f"times faster than the baseline, with the 95% interval of the median over {ratios[0].rounds} paired rounds",
        *(unsteady if not all(ratio.steady for ratio in ratios) else []),
        *losses,
    ]


def _ratio(ratio: Ratio) -> str:
    return figures.interval(ratio.median, ratio.low, ratio.high, ratio.steady)


def measurement_rows(entries: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Rows:
    """One row for each key and value of the timing cache; ratios are over the first form, or over the input."""
    rows: Rows = [("choice", "taken", "times as fast as the first form", "shapes", "threads", "engine")]
    for key, value in entries:
        shapes = " | ".join(" ".join("x".join(map(str, shape)) for shape in one) for one in key["shapes"])
        threads = "default" if key["threads"] is None else str(key["threads"])
        rows.append((key["choice"], *_outcome(value), shapes, threads, key["engine"]))
    return rows


def _outcome(value: Mapping[str, Any]) -> tuple[str, str]:
    """What was taken, and its ratios: of a result over the input, of sites that lost, or of the forms of a pattern."""
    if "slower" in value:
        ratios = ", ".join(figures.interval(one["median"], one["low"], one["high"]) for one in value["ratios"])
        return "slower" if value["slower"] else "not slower", ratios
    if "lost" in value:
        return "reverted", ", ".join(value["lost"]) or "none"
    others = dict(list(value["ratios"].items())[1:])
    dropped = [f"{form} dropped" for form in value["dropped"]]
    return value["form"], ", ".join(filter(None, [figures.ratios(others), *dropped]))


# --- graphs --------------------------------------------------------------------------------------------------------


def group_rows(groups: Sequence[Group]) -> Rows:
    """One row for what shrinks together: its units, how many sites write and read them, and what locks it."""
    rows: Rows = [("group", "kind", "units", "producers", "consumers", "locked")]
    return rows + [
        (group.name, group.kind, str(group.size), str(len(group.producers)), str(len(group.consumers)),
         Reason.of(group.locked) if group.locked else "")
        for group in groups
    ]  # fmt: skip


def branch_rows(branches: Sequence[Branch]) -> Rows:
    """One row for a residual branch: how many sites it has, and what locks it."""
    rows: Rows = [("residual branch (layers)", "sites", "locked")]
    return rows + [
        (branch.name, str(len(branch.sites)), Reason.of(branch.locked) if branch.locked else "") for branch in branches
    ]


def diff_summary(diff: GraphDiff) -> str:
    """How many lines were removed and added, and of which kinds of nodes there are more or fewer."""
    kinds = ", ".join(f"{kind} {before} -> {after}" for kind, (before, after) in diff.kinds.items())
    lines = f"{diff.removed} removed, {diff.added} added, {diff.unchanged} unchanged lines"
    return f"{lines}; {kinds}" if kinds else lines
