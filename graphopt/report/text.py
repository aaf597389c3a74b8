"""Plain text, at most 100 columns wide where names allow it; and how figures are written everywhere."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.report.agreements import Agreement
from graphopt.report.declines import Reason
from graphopt.report.diff import GraphDiff
from graphopt.report.records import PassRecord, Report

if TYPE_CHECKING:
    from graphopt.analysis.groups import Group
    from graphopt.analysis.propagation import Propagation
    from graphopt.measure.timing import Ratio
    from graphopt.report.records import BenchResult, Comparison, Damage, Sensitivity

WIDTH = 100
SITES = 3
"""Declined sites that are named for each reason."""

ROWS = 10
"""Sites of a sensitivity table that a report shows."""

Rows = list[tuple[str, ...]]
"""A table; the first row is its header."""


def report(report: Report) -> str:
    """What was done to a model, why the rest was not, and what that did to cost and outputs."""
    outputs = [textwrap.indent(table(agreement_rows(report.agreement)), "  ")] if report.agreement else []
    sections = [
        _heading(report),
        _titled("notes", [_wrapped(note, "  - ") for note in remarks(report)]),
        table(pass_rows(report)),
        _titled("declined", [_declined(record) for record in report.passes if record.declined]),
        *(_titled(f"sensitivity, for {one.name}", [textwrap.indent(sensitivity(one.sensitivity, ROWS), "  ")])
          for one in report.passes if one.sensitivity is not None),
        _titled("outputs against the original", outputs),
        _titled("kernels that the engine built", [_wrapped(counts(report.kernels), "  ")] if report.kernels else []),
        _titled("choices", [_wrapped(line, "  ") for line in choices(report)]),
        _titled("speed over the input", [textwrap.indent(table(speed_rows(report)), "  ")] if report.speed else []),
        _titled("reverted", [_wrapped(line, "  ") for line in reverted(report)]),
    ]
    return "\n\n".join(section for section in sections if section)


def diff(diff: GraphDiff, context: int | None = 3) -> str:
    """Changed lines with - and +, and `context` unchanged lines around them (None: all)."""
    lines = [diff_summary(diff)]
    for section in diff.sections(context):
        if isinstance(section, int):
            lines.append(f"  ... {section} unchanged")
        else:
            lines += [f"{line.mark} {line.text}".rstrip() for line in section]
    return "\n".join(lines)


def comparison(found: Comparison) -> str:
    """One row an output; one row a site, where they were asked for."""
    inside = [] if found.propagation is None else [table(site_rows(found.propagation))]
    return "\n\n".join([table(comparison_rows(found)), *inside, "\n".join(comparison_notes(found))])


def comparison_rows(found: Comparison) -> Rows:
    rows: Rows = [("output", "SQNR", "cosine", "max error", "top-1")]
    return rows + [
        (one.output, decibels(one.sqnr), cosine(one.cosine), f"{one.max_error:.3g}", share(one.top1))
        for one in found.outputs
    ]


def site_rows(found: Propagation) -> Rows:
    """In the order of the graph."""
    rows: Rows = [("site", "op", "SQNR", "cosine")]
    return rows + [(one.site, one.kind, decibels(one.sqnr), cosine(one.cosine)) for one in found.sites]


def comparison_notes(found: Comparison) -> list[str]:
    """How many batches, and what the sites say."""
    batches = "1 batch" if found.batches == 1 else f"{found.batches} batches; SQNR and cosine are of the worst"
    notes, inside = [f"over {batches}"], found.propagation
    if inside is None:
        return notes
    from graphopt.analysis.propagation import LOST

    lost, worst = inside.lost, inside.noisiest
    below = f"below {LOST:g} dB"
    notes.append(f"no site is {below}" if lost is None else f"first {below}: {lost.site}, {decibels(lost.sqnr)}")
    if worst is not None:
        read = f"what it reads has {decibels(worst.before)}" if math.isfinite(worst.before) else "it reads no noise"
        notes.append(f"most noise is added by {worst.site}: {read}, its result {decibels(worst.sqnr)}")
    alone = declined(inside.unpaired)
    return notes + [f"not compared, {number} x {reason}: {names}" for reason, number, names in alone]


def bench(result: BenchResult) -> str:
    """The machine, one row a shape, and the geometric means."""
    return "\n\n".join([result.header, table(bench_rows(result)), "\n".join(bench_notes(result))])


def bench_rows(result: BenchResult) -> Rows:
    """One row a shape: the baseline's p50, and how many times faster each candidate is, with the 95% interval."""
    candidates = list(result.rows[0][1])
    baseline = next(iter(result.rows[0][1][candidates[0]].seconds))
    rows: Rows = [("inputs", f"{baseline}, ms", *candidates)]
    for shapes, ratios in result.rows:
        seconds = ratios[candidates[0]].seconds[baseline][0]
        rows.append((shapes, milliseconds(seconds), *(_ratio_text(ratios[name]) for name in candidates)))
    if len(result.rows) > 1:
        from graphopt.measure.timing import geometric_mean

        means = [geometric_mean(ratios[name].median for _, ratios in result.rows) for name in candidates]
        rows.append(("geometric mean", "", *(f"{mean:.2f}" for mean in means)))
    return rows


def bench_notes(result: BenchResult) -> list[str]:
    """How to read the rows, and where a candidate loses for certain."""
    from graphopt.measure.timing import slower_than

    ratios = [ratio for _, row in result.rows for ratio in row.values()]
    unsteady = ["~ the machine kept changing speed: the steadiest few rounds had to do"]
    losses = [f"{name} is slower than the baseline at {shapes}"
              for shapes, row in result.rows for name, ratio in row.items() if slower_than(ratio)]  # fmt: skip
    return [
        f"times faster than the baseline, with the 95% interval of the median over {ratios[0].rounds} paired rounds",
        *(unsteady if not all(ratio.steady for ratio in ratios) else []),
        *losses,
    ]


def _ratio_text(ratio: Ratio) -> str:
    return interval(ratio.median, ratio.low, ratio.high, ratio.steady)


def interval(median: float, low: float, high: float, steady: bool = True) -> str:
    """A median and its 95% interval, which few rounds do not bound; ~ where the machine was unsteady."""
    sure = f" [{low:.2f}, {high:.2f}]" if math.isfinite(high) else ""
    return f"{'' if steady else '~'}{median:.2f}{sure}"


def sensitivity(found: Sensitivity, limit: int | None = None) -> str:
    """One row a site, the most sensitive first, and what the columns are; `limit`: most rows."""
    rows = sensitivity_rows(found)
    shown = rows if limit is None else rows[: limit + 1]
    left_out = [f"... {len(rows) - len(shown)} less sensitive"] if len(shown) < len(rows) else []
    parts = ["\n".join([table(shown), *left_out])] if len(rows) > 1 else []
    return "\n\n".join([*parts, "\n".join(_wrapped(line, "") for line in sensitivity_notes(found))])


def sensitivity_rows(found: Sensitivity) -> Rows:
    """One row a site, by its worst rank over the settings: with one setting all figures, with several the main ones."""
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
        rows.append((site, decibels(damage.sqnr), cosine(damage.cosine), cosine(damage.worst_cosine), *metric))
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
        reasons = {row.site: row.declined for row in found.rows if row.setting == setting and row.damage is None}
        notes += [f"{setting} declined {number} x {reason}: {names}" for reason, number, names in declined(reasons)]
    return notes


def _brief(damage: Damage | None) -> str:
    if damage is None:
        return "-"
    return decibels(damage.sqnr) + (f"  {damage.metric:.5g}" if damage.metric is not None else "")


def groups(found: Sequence[Group]) -> str:
    """One row for what shrinks together: its units, how many sites write and read them, and what locks it."""
    rows: Rows = [("group", "kind", "units", "producers", "consumers", "locked")]
    for group in found:
        figures = str(group.size), str(len(group.producers)), str(len(group.consumers))
        rows.append((group.name, group.kind, *figures, Reason.of(group.locked) if group.locked else ""))
    return table(rows) if found else "no group of axes shrinks together: there is no linear, conv or embedding"


def pass_rows(report: Report) -> Rows:
    """One row a pass; SQNR and cosine are those of the worst output."""
    header = "pass", "sites", "changed", "declined", "nodes", "FLOPs", "parameters", "size", "SQNR", "cosine", "seconds"
    return [header, *(_pass_row(record) for record in report.passes)]


def agreement_rows(found: Sequence[Agreement]) -> Rows:
    """One row an output."""
    rows: Rows = [("output", "SQNR", "cosine", "max error")]
    return rows + [(one.output, decibels(one.sqnr), cosine(one.cosine), f"{one.max_error:.3g}") for one in found]


def kernel_rows(report: Report) -> Rows:
    """One row a kernel."""
    return [("kernel", "built"), *((kind, str(number)) for kind, number in report.kernels.items())]


def cost_rows(report: Report) -> list[tuple[str, str]]:
    """Size, parameters and FLOPs before and after."""
    before, after = report.cost_before, report.cost_after
    rows = [
        ("size", f"{size(before.bytes)} -> {size(after.bytes)}{_ratio(before.bytes, after.bytes)}"),
        ("parameters", f"{count(before.parameters)} -> {count(after.parameters)}"),
    ]
    if before.flops is not None and after.flops is not None:
        rows.append(("FLOPs", f"{count(before.flops)} -> {count(after.flops)}"))
    return rows


def remarks(report: Report) -> list[str]:
    """What the user should know, of the whole and of each pass."""
    return [*report.notes, *(f"{record.name}: {note}" for record in report.passes for note in record.notes)]


def sites(record: PassRecord) -> str:
    """How much a pass did, in words."""
    if record.eligible:
        return f"{record.changed} of {len(record.eligible)} sites"
    return "1 change" if record.changed == 1 else f"{record.changed} changes"


def declined(reasons: Mapping[str, str]) -> list[tuple[str, int, str]]:
    """Of reasons by site: (reason, how many sites, some of their names), the most frequent first."""
    by_reason: dict[str, list[str]] = {}
    for label, reason in reasons.items():
        by_reason.setdefault(reason, []).append(label)
    ranked = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    return [(reason, len(labels), _some(labels)) for reason, labels in ranked]


def choices(report: Report) -> list[str]:
    """One line for each choice that touched a site or declined one, and one for each kind of site that was measured."""
    lines = []
    for choice in report.choices:
        details = [f"sites {choice['sites']}"] if choice["sites"] else []
        details += [f"declined {n} x {reason}: {names}" for reason, n, names in declined(choice["declined"])]
        details += [contest(one) for one in choice.get("measured", ())]
        if details:
            lines.append(f"{choice['rule']}: {'; '.join(details)}")
    return lines


def contest(measured: Mapping[str, Any]) -> str:
    """The form of some sites, how fast each form is over the first, and those that were dropped."""
    number = f" and {measured['sites'] - 1} like it" if measured["sites"] > 1 else ""
    told = f"{measured['site']}{number} as {measured['form']}"
    ratios = list(measured["ratios"].items())
    told += f" ({ratios_text(dict(ratios[1:]))} over {ratios[0][0]})" if ratios else ""
    told += "" if measured["sure"] else ", by the static order as the machine was unsteady"
    return told + "".join(f", {form} dropped: {reason}" for form, reason in measured["dropped"].items())


def contest_rows(entries: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Rows:
    """One row for each key and value of the cache of timings; ratios are over the first form, or over the input."""
    rows: Rows = [("choice", "taken", "times as fast as the first form", "shapes", "threads", "engine")]
    for key, value in entries:
        shapes = " | ".join(" ".join("x".join(map(str, shape)) for shape in one) for one in key["shapes"])
        threads = "default" if key["threads"] is None else str(key["threads"])
        rows.append((key["choice"], *_taken(value), shapes, threads, key["engine"]))
    return rows


def _taken(value: Mapping[str, Any]) -> tuple[str, str]:
    """What became of a contest, and its ratios: of the forms of a pattern, or of a result at each shape."""
    if "slower" in value:
        ratios = ", ".join(interval(one["median"], one["low"], one["high"]) for one in value["ratios"])
        return "slower" if value["slower"] else "not slower", ratios
    if "lost" in value:
        return "reverted", ", ".join(value["lost"]) or "none"
    others = dict(list(value["ratios"].items())[1:])
    dropped = [f"{form} dropped" for form in value["dropped"]]
    return value["form"], ", ".join(filter(None, [ratios_text(others), *dropped]))


def ratios_text(ratios: Mapping[str, Sequence[float]]) -> str:
    """Form by form: median, and the 95% interval."""
    return ", ".join(f"{form} {interval(median, low, high)}" for form, (median, low, high) in ratios.items())


def speed_rows(report: Report) -> Rows:
    """One row an example shape."""
    rows: Rows = [("inputs", "times as fast", "rounds")]
    return rows + [
        (one["shapes"], interval(one["median"], one["low"], one["high"], one["steady"]), str(one["rounds"]))
        for one in report.speed
    ]


def reverted(report: Report) -> list[str]:
    """One line a site."""
    return [f"{site}: {reason}" for site, reason in report.reverted.items()]


def diff_summary(diff: GraphDiff) -> str:
    """Lines and kinds of nodes, in numbers."""
    kinds = ", ".join(f"{kind} {before} -> {after}" for kind, (before, after) in diff.kinds.items())
    lines = f"{diff.removed} removed, {diff.added} added, {diff.unchanged} unchanged lines"
    return _wrapped(f"{lines}; {kinds}" if kinds else lines, "")


def counts(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {number}" for kind, number in kinds.items())


def decibels(sqnr: float) -> str:
    return "equal" if sqnr == math.inf else f"{sqnr:.1f} dB"


def cosine(figure: float) -> str:
    return f"{figure:.5f}"


def share(figure: float | None) -> str:
    return "-" if figure is None else f"{100 * figure:.1f} %"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3f}"


def count(number: int) -> str:
    """12, 22.6 M: three digits and a suffix."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            scaled = number / limit
            return f"{scaled:.{max(0, 2 - int(math.log10(scaled)))}f} {suffix}"
    return str(number)


def size(in_bytes: int) -> str:
    """12 B, 90.3 MB: decimal, as file managers count."""
    return f"{count(in_bytes)}B" if in_bytes >= 1000 else f"{in_bytes} B"


def shortened(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 3] + "..."


def table(rows: Rows) -> str:
    """Columns as wide as needed, the first to the left and the others to the right; a rule under the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _pass_row(record: PassRecord) -> tuple[str, ...]:
    has_sites = bool(record.eligible)
    return (
        shortened(record.name, 16),
        str(len(record.eligible)) if has_sites else "-",
        str(record.changed),
        str(len(record.declined)) if has_sites or record.declined else "-",
        str(record.nodes_after),
        "-" if record.cost_after.flops is None else count(record.cost_after.flops),
        count(record.cost_after.parameters),
        size(record.cost_after.bytes),
        decibels(min(one.sqnr for one in record.agreement)) if record.agreement else "-",
        cosine(min(one.cosine for one in record.agreement)) if record.agreement else "-",
        f"{record.seconds:.2f}",
    )


def _heading(report: Report) -> str:
    rows = [("model", report.source), ("target", report.target), ("pipeline", report.pipeline), *cost_rows(report)]
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())))
    return "\n".join(_wrapped(value, f"{name:<11}") for name, value in rows if value)


def _declined(record: PassRecord) -> str:
    lines = [f"  {record.name}"]
    lines += [_wrapped(f"{reason}: {names}", f"    {number} x ") for reason, number, names in declined(record.declined)]
    return "\n".join(lines)


def _some(labels: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    named = ", ".join(labels[:SITES])
    return f"{named} and {len(labels) - SITES} more" if len(labels) > SITES else named


def _ratio(before: int, after: int) -> str:
    return f" ({before / after:.2f} times smaller)" if 0 < after < before else ""


def _titled(title: str, blocks: Sequence[str]) -> str:
    return "\n".join([title, *blocks]) if blocks else ""


def _wrapped(line: str, prefix: str) -> str:
    """`line` after `prefix`, its further lines under its beginning. Long names stay whole, to be copied."""
    return textwrap.fill(
        line,
        WIDTH,
        initial_indent=prefix,
        subsequent_indent=" " * len(prefix),
        break_long_words=False,
        break_on_hyphens=False,
    )
