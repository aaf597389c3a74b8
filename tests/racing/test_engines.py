"""What `target=` may name."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from graphopt.errors import UsageError
from graphopt.racing.engines import ENGINES, engines


def names(target: object, **options: str) -> list[str]:
    return [one.name for one in engines(target, None, options.get("precision", "auto")).backends]


def test_one_or_several() -> None:
    assert names("fbgemm") == ["fbgemm"]
    assert names(["torch-cpu", "onnxruntime"]) == names("torch-cpu, onnxruntime") == ["torch-cpu", "onnxruntime"]
    assert not engines("fbgemm", None, "auto").is_several
    assert engines(["fbgemm"], None, "auto").is_several


def test_fastest_takes_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = engines("fastest", None, "auto")
    assert [one.name for one in found.backends] == ["onnxruntime", "torch-cpu"]
    assert set(found.absent) == set(ENGINES) - {"onnxruntime", "torch-cpu"}
    assert "pip install 'graphopt[openvino]'" in found.absent["openvino"]


def test_an_engine_that_is_named_must_be_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r"pip install 'graphopt\[openvino\]'"):
        engines(["onnxruntime", "openvino"], None, "auto")
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(__version__="2024.6.0-17404-abc"))
    with pytest.raises(UsageError, match=r"needs openvino 2026\.4 or newer, and 2024\.6\.0 is installed: .*openvino"):
        engines("openvino", None, "auto")


def test_options_in_braces() -> None:
    found = engines(["fbgemm{precision=float32}", "onednn"], None, "auto")
    assert found.precisions == {"fbgemm": "float32", "onednn": "auto"}
    assert engines("fbgemm,onednn", None, "float32").precisions == {"fbgemm": "float32", "onednn": "float32"}


@pytest.mark.parametrize(
    ("target", "cpu", "message"),
    [
        ("fastest", "avx2", "cpu=avx2 is another machine, and engines can only be raced on this one"),
        (["onnxruntime"], "avx2", "cpu=avx2 is another machine"),
        ([], None, "an empty list"),
        ("", None, "no target without a name"),
        (["fastest", "fbgemm"], None, "give it alone"),
        ("fbgemm,fbgemm", None, "fbgemm is listed twice"),
        ("fbgemm{speed=high}", None, "no option 'speed'; there is precision"),
        ("fbgemm{precision=bf16}", None, "did you mean 'bfloat16'"),
        (["onnxruntime", "openvin"], None, "did you mean 'openvino'"),
        ("fastes", None, "no target 'fastes'"),
        (["fbgemm", "tensorrt"], None, "tensorrt does not run here"),
        (7, None, "give the name of one, or a list of names"),
    ],
)
def test_what_is_no_target(target: object, cpu: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        engines(target, cpu, "auto")
