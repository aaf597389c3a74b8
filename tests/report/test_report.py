"""The report as data, text, terminal and html; the diff of two graphs."""

from __future__ import annotations

import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from graphopt.errors import GraphError, UsageError
from graphopt.ir.cost import Cost
from graphopt.ir.decline import Decline
from graphopt.ir.rewrite import RuleLog
from graphopt.measure.timing import Ratio
from graphopt.report import figures, html, tables
from graphopt.report.agreements import Agreement
from graphopt.report.declines import Reason
from graphopt.report.diff import DiffLine, GraphDiff
from graphopt.report.records import BenchResult, PassRecord, Report, count_kinds, plain
from tests.language import build

WIDE = Reason.of(Decline("told", sentence="rank 8 holds no fewer numbers than [8, 8]"))
LAYERS = [f"encoder.layer.{index}.attention.self.query" for index in range(5)]


def example() -> Report:
    record = PassRecord(
        "low-rank",
        "low-rank{energy=0.9}",
        stage="FACTORIZE",
        eligible=[*LAYERS, "head"],
        declined={label: WIDE for label in LAYERS},
        changes=1,
        seconds=0.25,
        nodes_before=10,
        nodes_after=11,
        cost_before=Cost(None, 22_600_000, 90_400_000),
        cost_after=Cost(600, 11_300_000, 45_200_000),
        agreement=[Agreement("logits", math.inf, 1.0, 0.0), Agreement("hidden", 31.25, 0.99912, 0.5)],
        rules={"split": RuleLog(tries=3, hits=1, declined={"head": Decline("too_wide", limit=0.5)})},
        notes=["<b>look</b>"],
    )
    tidy = PassRecord("simplify", "simplify", changes=3)
    return Report(
        target="onnxruntime",
        source="tiny.onnx",
        pipeline="simplify,low-rank{energy=0.9}",
        versions={"torch": "2.13.0"},
        notes=["the export fixed axis 1 of x at 8"],
        passes=[tidy, record],
        cost_before=Cost(1000, 22_600_000, 90_400_000),
        cost_after=Cost(600, 11_300_000, 45_200_000),
        kernels={"MatMul": 7},
        choices=[
            {"rule": "dynamic", "sites": 0, "declined": dict.fromkeys(LAYERS, "static")},
            {"rule": "idle", "sites": 0, "declined": {}},
        ],
        agreement=[Agreement("logits", 31.25, 0.99912, 0.5)],
    )


def test_changed_counts_sites_or_changes() -> None:
    tidy, record = example().passes
    assert (tidy.changed, record.changed) == (3, 1)
    record.decline("no site of this pass", Decline("too_wide"))
    assert record.changed == 1


def test_to_dict_is_standard_json() -> None:
    facts = json.loads(json.dumps(example().to_dict(), allow_nan=False))
    assert facts["passes"][1]["agreement"][0]["sqnr"] == "inf"
    assert facts["passes"][1]["changed"] == 1
    assert facts["passes"][1]["rules"]["split"]["hits"] == 1
    assert list(facts)[:4] == ["target", "source", "pipeline", "versions"]
    assert facts["cost_after"] == {"flops": 600, "parameters": 11_300_000, "bytes": 45_200_000}


def test_to_dict_has_code_values_and_sentence_of_a_decline() -> None:
    facts = json.loads(json.dumps(example().to_dict(), allow_nan=False))
    record = facts["passes"][1]
    assert record["declined"][LAYERS[0]] == {
        "code": "told", "values": {"sentence": str(WIDE)}, "sentence": "rank 8 holds no fewer numbers than [8, 8]",
    }  # fmt: skip
    assert record["rules"]["split"]["declined"]["head"] == {
        "code": "too_wide", "values": {"limit": 0.5}, "sentence": "too wide (limit 0.5)",
    }  # fmt: skip


def test_plain_of_what_json_lacks() -> None:
    assert plain({1: (math.nan, -math.inf, 1.5, True, None), "path": LAYERS}) == {
        "1": ["nan", "-inf", 1.5, True, None],
        "path": LAYERS,
    }
    assert plain(Cost(1, 2, 3)) == {"flops": 1, "parameters": 2, "bytes": 3}


def test_text_says_everything_in_100_columns() -> None:
    lines = str(example()).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[:6] == [
        "2.0 times smaller, speed not measured, cosine 0.9991",
        "",
        "model      tiny.onnx",
        "target     onnxruntime",
        "pipeline   simplify,low-rank{energy=0.9}",
        "size       90.4 MB -> 45.2 MB (2.00 times smaller)",
    ]
    row = next(line.split() for line in lines if line.startswith("low-rank "))
    assert row == ["low-rank", "6", "1", "5", "11", "600", "11.3", "M", "45.2", "MB", "31.2", "dB", "0.99912", "0.25"]
    simplify = next(line.split() for line in lines if line.startswith("simplify "))
    assert simplify[:4] == ["simplify", "-", "3", "-"]
    joined = " ".join(" ".join(lines).split())
    assert f"5 x rank 8 holds no fewer numbers than [8, 8]: {', '.join(LAYERS[:3])} and 2 more" in joined
    assert f"dynamic: declined 5 x static: {', '.join(LAYERS[:3])} and 2 more" in joined
    assert "idle" not in joined
    assert "MatMul 7" in joined and "the export fixed axis 1 of x at 8" in joined


@pytest.mark.parametrize(
    ("number", "written"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (22_649_000, "22.6 M"), (512_000, "512 k"), (1_234_000_000, "1.23 G")],
)
def test_counts(number: int, written: str) -> None:
    assert figures.count(number) == written


def test_figures() -> None:
    assert figures.size(90) == "90 B" and figures.size(90_400_000) == "90.4 MB"
    assert figures.decibels(math.inf) == "equal" and figures.decibels(31.25) == "31.2 dB"
    assert figures.share(None) == "-" and figures.share(0.985) == "98.5 %"
    assert figures.shortened("abcdef", 5) == "ab..." and figures.shortened("abcde", 5) == "abcde"


def rendered(what: object, colours: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=200, force_terminal=colours, color_system="standard" if colours else None
    )
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_terminal_shows_the_same_figures() -> None:
    shown = rendered(example())
    for fact in ("low-rank", "31.2 dB", "0.99912", "rank 8 holds no fewer numbers", "MatMul", "<b>look</b>", "45.2 MB"):
        assert fact in shown


class Tags(HTMLParser):
    """Opens and closes every tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.links += [str(value) for key, value in attrs if key in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_one_escaped_page() -> None:
    diff = GraphDiff("%0 = linear(x[<i>])", "%0 = gelu(x[<i>])\n%1 = linear(%0[2])")
    page = Tags(html.page(example(), diff, "a <title>"))
    assert page.open == [] and page.links == []
    assert not {"b", "script", "link", "img"} & page.seen
    for fact in ("<b>look</b>", "31.2 dB", "5: rank 8 holds no fewer", "+ %0 = gelu(x[<i>])", "a <title>", "22.6 M"):
        assert fact in page.text


def test_a_report_is_saved_by_the_suffix(tmp_path: Path) -> None:
    for name in ("a.html", "a.txt", "a.json"):
        example().save(tmp_path / name, GraphDiff("a", "b"))
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and "- a" in Tags(page).text
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == f"{example()}\n"
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == json.loads(json.dumps(example().to_dict()))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.html", "a.json", "a.txt"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("a.pdf", UsageError, "a.pdf ends in .pdf, and a report is an .html, .txt or .json file: name it a.html"),
        ("a", UsageError, "a has no suffix, and a report is an .html, .txt or .json file: name it a.html"),
        ("none/a.html", GraphError, "there is no folder .*none; make it first"),
    ],
)
def test_a_report_that_cannot_be_saved(name: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        example().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_notebooks_get_a_fragment() -> None:
    assert example()._repr_html_().strip().startswith('<div class="graphopt">')
    assert "- a" in Tags(GraphDiff("a", "b")._repr_html_()).text


# --- the diff ------------------------------------------------------------------------------------------------------


def test_diff_looks_past_renumbering(dialect: str) -> None:
    before = build(dialect, "h = linear(x[2,8], W[8,8])\ny = gelu(h)\nz = relu(y)")
    after = build(dialect, "h = linear(x[2,8], V[2,8])\ng = linear(h, U[8,2])\ny = gelu(g)\nz = relu(y)")
    diff = GraphDiff.of(before, after)
    assert diff.lines == [
        DiffLine("-", "%0 = linear(x[2,8], [8,8])"),
        DiffLine("+", "%0 = linear(x[2,8], [2,8])"),
        DiffLine("+", "%1 = linear(%0[2,2], [8,2])"),
        DiffLine(" ", "%2 = gelu(%1[2,8])"),
        DiffLine(" ", "%3 = relu(%2[2,8])"),
        DiffLine(" ", "return %3[2,8]"),
    ]
    assert (diff.removed, diff.added, diff.unchanged) == (1, 2, 3)
    assert diff.kinds == {"linear": (1, 2)}


def test_kinds_of_nodes_with_several_results() -> None:
    diff = GraphDiff("%0, %1 = choose_qparams(x[2])\n%2 = onnx.Loop(%0[])\nreturn %2[]", "return x[2]")
    assert diff.kinds == {"choose_qparams": (1, 0), "onnx.Loop": (1, 0)}


def test_diff_text_folds_what_is_far_from_a_change() -> None:
    lines = [f"%{index} = relu(x[{index}])" for index in range(20)]
    changed = [*lines[:10], "%10 = gelu(x[10])", *lines[11:]]
    diff = GraphDiff("\n".join(lines), "\n".join(changed))
    assert diff.text(context=1).splitlines() == [
        "1 removed, 1 added, 19 unchanged lines; gelu 0 -> 1, relu 20 -> 19",
        "  ... 9 unchanged",
        "  %9 = relu(x[9])",
        "- %10 = relu(x[10])",
        "+ %10 = gelu(x[10])",
        "  %11 = relu(x[11])",
        "  ... 8 unchanged",
    ]
    assert len(diff.text(context=None).splitlines()) == 1 + 21
    assert str(GraphDiff("a\nb", "a\nb")).splitlines() == ["0 removed, 0 added, 2 unchanged lines", "  ... 2 unchanged"]


def test_diff_in_colours() -> None:
    shown = rendered(GraphDiff("a", "b"), colours=True)
    assert "\x1b[31m- a" in shown and "\x1b[32m+ b" in shown


def test_count_kinds_ranks_by_number() -> None:
    graph = build("onnx", "a = relu(x[2])\nb = gelu(a)\nc = relu(b)\nd = add(a, c)")
    assert list(count_kinds(graph.nodes).items()) == [("relu", 2), ("add", 1), ("gelu", 1)]


# --- the table of timings ------------------------------------------------------------------------------------------


def test_a_loss_beyond_doubt_has_a_note() -> None:
    seconds = {"original": (0.004, 0.005), "optimized": (0.005, 0.006)}
    rows = {"small": Ratio(0.8, 0.7, 0.95, 15, 0, seconds), "large": Ratio(0.99, 0.9, 1.1, 15, 0, seconds)}
    result = BenchResult("machine", [(shapes, {"optimized": ratio}) for shapes, ratio in rows.items()])
    assert [note for note in tables.bench_notes(result) if "slower" in note] == [
        "optimized is slower than the baseline at small"
    ]


def test_bench_tables() -> None:
    ratio = Ratio(2.0, 1.8, 2.2, 15, 0, {"original": (0.004, 0.005), "optimized": (0.002, 0.003)})
    control = Ratio(1.0, 0.0, math.inf, 3, 0, {"original": (0.004, 0.005), "control": (0.004, 0.005)}, steady=False)
    faster = Ratio(8.0, 7.0, 9.0, 15, 0, {"original": (0.008, 0.009), "optimized": (0.001, 0.002)})
    by_shape = {"x [1, 8]": ratio, "x [8, 8]": faster}
    rows = [(shapes, {"optimized": one, "control": control}) for shapes, one in by_shape.items()]
    result = BenchResult("machine", list(rows))
    assert tables.bench_rows(result) == [
        ("inputs", "original, ms", "optimized", "control"),
        ("x [1, 8]", "4.000", "2.00 [1.80, 2.20]", "~1.00"),
        ("x [8, 8]", "8.000", "8.00 [7.00, 9.00]", "~1.00"),
        ("geometric mean", "", "4.00", "1.00"),
    ]
    assert str(result).startswith("machine\n")
    assert "15 paired rounds" in str(result) and "kept changing speed" in str(result)
    headline = "2.0 [1.8, 2.2] to 8.0 [7.0, 9.0] times as fast over 2 shapes"
    assert repr(result) == f"<BenchResult: {headline}>"
    for shown in (rendered(result), result._repr_html_()):
        assert headline in shown and "8.00 [7.00, 9.00]" in shown and "machine" in shown


def test_an_empty_report_can_be_shown() -> None:
    first, _, size, *_ = str(Report()).splitlines()
    assert (first, size) == ("no smaller, speed not measured, outputs not compared", "size       0 B -> 0 B")
    assert "0 B -> 0 B" in rendered(Report())
