"""Errors: whatever a user does wrong, a public function raises a GraphoptError, with its cause chained."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt import CaptureError, GraphError, GraphoptError, LoweringError, Optimized, PassError, UsageError
from graphopt.capture import capture
from graphopt.errors import LONGEST, described, first_line, nearest, outer_door, user_batches, user_code
from graphopt.foreign import reason
from tests.models import model

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
TEXT = "g (float[n,8] x) => (float[n,8] y) { h = MatMul(x, W)  r = Relu(h)  y = MatMul(r, W) }"


def small_model() -> onnx.ModelProto:
    return model(TEXT, {"W": torch.randn(8, 8, generator=torch.Generator().manual_seed(1))})


@pytest.fixture(scope="module")
def optimized() -> Optimized:
    return graphopt.optimize(small_model(), example_inputs=X)


# --- the door ------------------------------------------------------------------------------------------------------


def test_the_family() -> None:
    for kind in (UsageError, CaptureError, PassError, LoweringError, GraphError):
        assert issubclass(kind, GraphoptError)
    assert issubclass(UsageError, ValueError)


def test_a_door_chains_what_is_not_graphopts() -> None:
    message = "it cannot be lowered: KeyError: 'w'"
    with pytest.raises(LoweringError, match=message) as caught, outer_door(LoweringError, "it cannot be lowered"):
        raise KeyError("w")
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("error", [UsageError("as it is"), KeyboardInterrupt(), SystemExit(3)])
def test_a_door_lets_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, outer_door(GraphError, "never seen"):
        raise error
    assert caught.value is error and error.__cause__ is None


def test_a_door_is_a_decorator_and_may_say_late_what_failed() -> None:
    said: list[str] = []

    @outer_door(GraphError, lambda: said.append("once") or "halving fails")  # type: ignore[func-returns-value]
    def half(number: Any) -> float:
        """Half of it."""
        return float(number / 2)

    assert half(3) == 1.5 and not said and half.__doc__ == "Half of it."
    for _ in range(2):
        with pytest.raises(GraphError, match="halving fails: TypeError"):
            half("3")
    assert said == ["once", "once"]


def test_code_of_the_user_is_named() -> None:
    with pytest.raises(UsageError, match="your loss function failed: ZeroDivisionError: division by zero"):
        user_code("loss function", lambda x: x / 0)(1)

    def batches() -> Iterator[int]:
        yield 1
        raise OSError(5, "Input/output error", "disk.npz")

    taken = user_batches("calibration batches", batches())
    assert next(taken) == 1
    message = r"your calibration batches failed: OSError: Input/output error \(disk.npz\)"
    with pytest.raises(UsageError, match=message):
        next(taken)
    assert list(user_batches("calibration batches", [1, 2])) == [1, 2]


FOREIGN = {
    "[ONNXRuntimeError] : 1 : FAIL : Load failed": "Load failed",
    "\x1b[1;31mNo such kernel\x1b[m": "No such kernel",
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Reshape node. "
    "Name:'turn' Status Message: /src/reshape_helper.h:39 onnxruntime::Helper::Helper(const Shape&, bool) "
    "size != 0 was false. The input cannot be reshaped": "Reshape (turn): The input cannot be reshaped",
    "a sentence. And v1.2 of it": "a sentence. And v1.2 of it",
}
"""By what an engine says, what remains of it."""


@pytest.mark.parametrize("message", FOREIGN)
def test_an_engines_message_keeps_the_node_and_the_reason(message: str) -> None:
    assert reason(message) == FOREIGN[message]


def test_one_line_of_an_error() -> None:
    assert first_line(ValueError("\n first \nsecond")) == "first"
    assert first_line(ValueError()) == described(ValueError()) == "ValueError"
    assert described(RuntimeError("the engine\n  says no")) == "RuntimeError: the engine says no"
    assert described(RuntimeError("x" * 1000)) == "RuntimeError: " + "x" * LONGEST + " ..."
    assert nearest("quantise", ["quantize", "prune"]) == "; did you mean 'quantize'?"
    assert nearest("zzz", ["b", "a"]) == "; there are a, b"


# --- each public function ------------------------------------------------------------------------------------------


class Raises:
    """Batches of which the second cannot be read."""

    def __iter__(self) -> Iterator[Tensor]:
        yield X
        raise KeyError("image 17")


def failing(*_: Any) -> Any:
    raise ZeroDivisionError("division by zero")


STATIC = "quantize{scheme=static}"

WRONG_OPTIMIZE: dict[str, tuple[dict[str, Any], type[GraphoptError], str]] = {
    "target": ({"target": 3}, UsageError, "target is 3; give the name of one, or a list of names"),
    "unknown target": ({"target": "onnxruntme"}, UsageError, "did you mean 'onnxruntime'"),
    "cpu": ({"cpu": "z80"}, UsageError, "there is no cpu 'z80'"),
    "passes": ({"passes": object()}, UsageError, "give pass objects, or one text"),
    "failing passes": ({"passes": (failing() for _ in range(1))}, UsageError, "division by zero"),
    "threads": ({"threads": "two"}, UsageError, "give a whole number"),
    "calibration that raises": (
        {"passes": STATIC, "calibration": Raises()}, UsageError, "your calibration batches failed: KeyError: 'image 17'"
    ),
    "calibration steps": (
        {"passes": STATIC, "calibration": [X], "calibration_steps": "few"},
        UsageError,
        "calibration_steps is 'few'; give a whole number, at least 1",
    ),
    "evaluate that raises": (
        {"passes": "quantize{scheme=dynamic metric=0.5}", "calibration": [X], "evaluate": failing}, UsageError,
        "your evaluate function failed: ZeroDivisionError|metric",
    ),
    "example inputs": ({"example_inputs": object()}, CaptureError, "give a torch tensor or a numpy array"),
    "instruments": ({"instruments": 3}, GraphoptError, "TypeError"),
    "instruments that are none": ({"instruments": [3]}, UsageError, "instruments: 3 is a int; give"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_OPTIMIZE)
def test_optimize(case: str) -> None:
    options, kind, message = WRONG_OPTIMIZE[case]
    with pytest.raises(kind, match=message):
        graphopt.optimize(small_model(), **{"example_inputs": X, **options})


class FailsLate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise FileNotFoundError("no table")


def test_capture(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"FailsLate fails on the example inputs .*FileNotFoundError: no table"):
        capture(FailsLate(), "fx", example_inputs=X)
    with pytest.raises(CaptureError, match=r"is a folder without config\.json"):
        capture(tmp_path, "onnx")
    with pytest.raises(CaptureError, match="there is no file"):
        capture(tmp_path / "missing.onnx", "onnx")
    with pytest.raises(CaptureError, match=r"dynamic_shapes is a int; give \{input: "):
        capture(nn.Linear(8, 8), "fx", example_inputs=X, dynamic_shapes=3)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(small_model().SerializeToString())
    path.chmod(0)
    with pytest.raises(CaptureError, match=r"Permission denied.*m\.onnx|m\.onnx.*Permission denied"):
        graphopt.optimize(path)


def test_a_call_with_another_dtype_or_shape(optimized: Optimized) -> None:
    with pytest.warns(UserWarning, match="x from float64 to float32"):
        torch.testing.assert_close(optimized(X.double()), optimized(X))
    message = r"does not run on x \[3, 9\] float32; it takes x \[n, 8\] float32: "
    with pytest.raises(UsageError, match=message) as caught:
        optimized(torch.zeros(3, 9))
    assert caught.value.__cause__ is not None
    for wrong in ((), (X, X), ("text",), (np.array(["a"]),)):
        with pytest.raises(CaptureError):
            optimized(*wrong)


def test_bench(optimized: Optimized) -> None:
    with pytest.raises(UsageError, match="does not run on x"):
        optimized.bench(torch.zeros(3, 9), rounds=1)
    with pytest.raises(UsageError, match="rounds is 0; give a whole number, at least 1"):
        optimized.bench(X, rounds=0)


@pytest.mark.parametrize("opset", [3, 10**6, "new"])
def test_export_at_an_opset_that_is_none(opset: Any, optimized: Optimized, tmp_path: Path) -> None:
    with pytest.raises(GraphoptError):
        optimized.export(tmp_path / "out.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


def test_export_where_nothing_can_be_written(optimized: Optimized, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"cannot be written: OSError: File name too long \("):
        optimized.export(tmp_path / f"{'x' * 300}.onnx")
    with pytest.raises(GraphError, match="cannot be written: TypeError"):
        optimized.export(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((nn.Linear(8, 8), nn.Linear(9, 9), [X]), UsageError, "the second model does not run on a batch: RuntimeError"),
        ((nn.ReLU(), nn.ReLU(), Raises()), UsageError, "your batches failed: KeyError: 'image 17'"),
        ((nn.ReLU(), FailsLate(), [X]), UsageError, "the second model does not run on a batch: FileNotFoundError"),
        ((nn.ReLU(), "missing.onnx", [X]), CaptureError, "there is no file missing.onnx"),
        ((nn.ReLU(), 3, [X]), UsageError, "cannot compare a int"),
        ((nn.ReLU(), nn.ReLU(), 3), UsageError, "must be an iterable of batches"),
        ((nn.ReLU(), nn.ReLU(), []), UsageError, "no batch"),
    ],
)
def test_compare(arguments: Any, kind: type[GraphoptError], message: str) -> None:
    with pytest.raises(kind, match=message):
        graphopt.compare(*arguments)
    with pytest.raises(UsageError, match="steps is 'x'"):
        graphopt.compare(nn.ReLU(), nn.ReLU(), [X], steps="x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"settings": 3}, UsageError, "sensitivity cannot use its arguments: TypeError"),
        ({"settings": "quantise"}, UsageError, "there is no pass 'quantise'"),
        ({"target": "nowhere"}, UsageError, "there is no target 'nowhere'"),
        ({"calibration": Raises()}, UsageError, "your calibration batches failed: KeyError: 'image 17'"),
        ({"evaluate": failing}, UsageError, "your evaluate function failed: ZeroDivisionError"),
        ({"steps": "x"}, UsageError, "steps is 'x'; give a whole number, at least 1"),
        ({"model": 3}, CaptureError, "cannot capture a builtins.int"),
    ],
)
def test_sensitivity(options: dict[str, Any], kind: type[GraphoptError], message: str) -> None:
    call: dict[str, Any] = {"model": small_model(), "settings": "sparsify{amount=0.5}", "calibration": [X], **options}
    with pytest.raises(kind, match=message):
        graphopt.sensitivity(call.pop("model"), call.pop("settings"), **call)


# --- damaged files -------------------------------------------------------------------------------------------------


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """The bytes of a file with up to 4 of them changed, a slice cut out, or a slice repeated."""
    position = st.integers(0, len(content) - 1)

    def changed(edits: list[tuple[int, int]]) -> bytes:
        edited = bytearray(content)
        for index, byte in edits:
            edited[index] = byte
        return bytes(edited)

    def cut(span: tuple[int, int]) -> bytes:
        start, end = sorted(span)
        return content[:start] + content[end:]

    def repeated(span: tuple[int, int]) -> bytes:
        start, end = sorted(span)
        return content[:end] + content[start:]

    spans = st.tuples(position, position)
    edits = st.lists(st.tuples(position, st.integers(0, 255)), min_size=1, max_size=4)
    return st.one_of(edits.map(changed), spans.map(cut), spans.map(repeated))


def without_weights() -> bytes:
    """A model that is structure more than weights, so that changes hit something."""
    weight = torch.eye(2)
    return bytes(model(TEXT.replace("8", "2"), {"W": weight}).SerializeToString())


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=mutated(without_weights()))
def test_a_damaged_file_raises_a_graphopt_error_or_is_optimized(content: bytes, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(content)
    calls: list[Callable[[], Any]] = [lambda: graphopt.optimize(path), lambda: graphopt.compare(path, path, [X[:, :2]])]
    for call in calls:
        try:
            call()
        except GraphoptError as error:
            assert "\n" not in str(error), error


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=5), st.binary(max_size=5),
    st.just(X), st.just(X.numpy()), st.just(nn.ReLU()), st.just(len), st.lists(st.integers(0, 2), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)  # fmt: skip
OPTIONS = [
    "passes", "target", "example_inputs", "dynamic_shapes", "calibration", "calibration_steps", "loss", "evaluate",
    "cache", "threads", "agree", "cpu", "instruments",
]  # fmt: skip


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(option=st.sampled_from(OPTIONS), value=ANYTHING)
def test_a_wrong_argument_raises_a_graphopt_error_or_none(option: str, value: Any) -> None:
    options = {"passes": STATIC, "calibration": [X], "example_inputs": X, option: value}
    try:
        graphopt.optimize(small_model(), **options)
    except GraphoptError as error:
        assert str(error)
