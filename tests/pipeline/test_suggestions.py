"""What is suggested for a name that does not exist: what was meant, or nothing."""

from __future__ import annotations

import string
from dataclasses import fields
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.backends import TARGETS
from graphopt.errors import UsageError, near, plain_name, typing_errors
from graphopt.passes import REGISTRY, Quantize
from graphopt.pipeline import aliases
from graphopt.pipeline.options import allowed
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.presets import PRESETS, RESERVED
from graphopt.pipeline.text import parse

OPTIONS = sorted({field.name for name in REGISTRY for field in fields(REGISTRY[name])})
NAMES = [*REGISTRY, *RESERVED, *TARGETS]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("int8", "quantize"), ("INT8", "quantize"), ("ptq", "quantize"), ("Quantize", "quantize"),
        ("quant", "quantize"), ("static", "quantize{scheme=static}"), ("dynamic", "quantize{scheme=dynamic}"),
        ("int4", "quantize{scheme=weight-only bits=4}"), ("weight_only", "quantize{scheme=weight-only}"),
        ("fp16", "cast"), ("half", "cast"), ("bf16", "cast{dtype=bfloat16}"), ("qat", "quantize,finetune"),
        ("svd", "low-rank"), ("lowrank", "low-rank"), ("low_rank", "low-rank"), ("magnitude", "sparsify"),
        ("2:4", "sparsify{pattern=2:4}"), ("smoothquant", "smooth"), ("pruning", "prune"), ("kd", "distill"),
        ("fine-tuning", "finetune"), ("quantise", "quantize"), ("repaet", "repeat"), ("fats", "fast"),
        ("fold_int8", "fold-int8"), ("lora", None), ("onnx", None), ("int16", None), ("int3", None), ("xyz", None),
    ],
)  # fmt: skip
def test_passes(written: str, meant: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        parse(written, REGISTRY)
    expected = f"; did you mean {meant!r}?" if meant else "; there are approximate, cast, "
    assert str(caught.value).startswith(f"there is no pass {written!r}{expected}")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("ort", "onnxruntime"), ("onnx", "onnxruntime"), ("ORT", "onnxruntime"), ("cpu", "onnxruntime"),
        ("onnxruntime-gpu", "onnxruntime-cuda"), ("trt", "tensorrt"), ("TensorRT", "tensorrt"), ("ov", "openvino"),
        ("pytorch", "torch-cpu"), ("gpu", "cuda"), ("mkldnn", "onednn"), ("onnxrutime", "onnxruntime"),
        ("tflite", None), ("coreml", None),
    ],
)  # fmt: skip
def test_targets(written: str, meant: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        TARGETS.lookup(written)
    expected = f"; did you mean {meant!r}?" if meant else "; there are cuda, fbgemm, "
    assert str(caught.value).startswith(f"there is no target {written!r}{expected}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsify{sparsity=0.5}", "sparsify has no option 'sparsity'; did you mean 'amount'?"),
        ("quantize{group_size=32}", "quantize has no option 'group_size'; did you mean 'block'?"),
        ("quantize{weight_bits=4}", "quantize has no option 'weight_bits'; did you mean 'bits'?"),
        ("quantize{exclude=head}", "quantize has no option 'exclude'; did you mean 'ignore'?"),
        ("finetune{learning_rate=0.1}", "finetune has no option 'learning_rate'; did you mean 'lr'?"),
        ("finetune{mode=x}", "finetune has no option 'mode'"),  # which has no scheme
        ("quantize{scheme=weight_only}", "; did you mean 'weight-only'?"),
        ("quantize{scheme=int8}", "quantize: scheme is 'int8'; give auto, static, dynamic, weight-only or a value for"),
        ("cast{dtype=fp16}", "did you mean 'float16'?"), ("cast{dtype=bf16}", "did you mean 'bfloat16'?"),
        ("quantize{dtype=int4}", "quantize: dtype is 'int4'; give int8 or float8"),
        ("quantize{rounding=rtn}", "did you mean 'nearest'?"),
    ],
)  # fmt: skip
def test_options_and_values(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text, REGISTRY)
    assert message in str(caught.value)
    assert ("did you mean" in str(caught.value)) == ("did you mean" in message)


def test_aliases_mean_what_is_there() -> None:
    tables: list[tuple[Any, list[str]]] = [
        (aliases.PASSES, [*REGISTRY, *RESERVED]), (aliases.TARGETS, list(TARGETS)), (aliases.OPTIONS, OPTIONS),
    ]  # fmt: skip
    for table, names in tables:
        for alias, text in table.items():
            assert alias == plain_name(alias), f"{alias} is never found"
            assert near(alias, names, table) == text
    for text in aliases.PASSES.values():
        assert text == "prune" or parse(text, REGISTRY).passes  # prune needs a share
    choices = {word for name in REGISTRY for field in fields(REGISTRY[name])
               for word in allowed(REGISTRY[name], field.name).replace(" or ", ", ").split(", ")}  # fmt: skip
    assert set(aliases.VALUES.values()) <= choices
    known = {plain_name(name) for name in NAMES}
    assert not known & {*aliases.PASSES, *aliases.TARGETS} - {"onnx"}, "what exists needs no alias"


def mistyped(name: str) -> st.SearchStrategy[str]:
    """The name with one letter missing, too many, wrong, or swapped with the next."""
    place = st.integers(0, len(name) - 2)
    letter = st.sampled_from(string.ascii_lowercase)
    return st.one_of(
        place.map(lambda at: name[:at] + name[at + 1 :]),
        place.map(lambda at: name[:at] + name[at + 1] + name[at] + name[at + 2 :]),
        st.tuples(place, letter).map(lambda pair: name[: pair[0]] + pair[1] + name[pair[0] :]),
        st.tuples(place, letter).map(lambda pair: name[: pair[0]] + pair[1] + name[pair[0] + 1 :]),
    )


LONG = st.sampled_from([name for name in NAMES if len(name) >= 4])


@given(LONG.flatmap(lambda name: mistyped(name).map(lambda written: (name, written))))
def test_one_typing_error_is_understood(pair: tuple[str, str]) -> None:
    name, written = pair
    limit = 2 if any(letter.isdigit() for letter in name) else 1
    if typing_errors(written, name) <= limit and len(written) >= 4:
        found = near(written, NAMES)
        assert found is not None and typing_errors(written, found) <= typing_errors(written, name)


@given(st.text(string.ascii_lowercase + string.digits + "-", min_size=1, max_size=12))
def test_nothing_far_is_suggested(written: str) -> None:
    found = near(written, NAMES)
    same = found is not None and plain_name(found) == plain_name(written)
    assert found is None or same or typing_errors(written, found) <= max(1, len(written) // 4)


@given(st.text("abc1", max_size=6), st.text("abc1", max_size=6), st.text("abc1", max_size=6))
def test_typing_errors_are_a_distance(a: str, b: str, c: str) -> None:
    assert typing_errors(a, b) == typing_errors(b, a) and (typing_errors(a, b) == 0) == (a == b)
    assert abs(len(a) - len(b)) <= typing_errors(a, b) <= 2 * max(len(a), len(b))


def test_a_part_of_a_module_path_is_enough() -> None:
    paths = ["encoder.0.query", "encoder.1.query", "head", "linear"]
    found = [near(name, paths) for name in ("encodr.1", "0.query", "1.qury", "lineer", "decoder.4", "relu")]
    assert found == ["encoder.1.query", "encoder.0.query", "encoder.1.query", "linear", None, None]


def test_some_distances() -> None:
    assert [typing_errors("amuont", "amount"), typing_errors("int8", "int4"), typing_errors("", "ab")] == [1, 2, 2]


# --- presets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("safe", "simplify"), ("fast", "simplify,quantize"),
        ("small", "simplify,quantize{scheme=weight-only bits=[4,8]},quantize"),
        ("prune{neurons=0.5},fast", "prune{neurons=0.5},simplify,quantize"),
        ("(safe),fast", "(simplify),simplify,quantize"),
    ],
)  # fmt: skip
def test_presets_are_spelled_out(text: str, spelled: str) -> None:
    pipeline = parse(text, REGISTRY)
    assert str(pipeline) == spelled and str(parse(spelled, REGISTRY)) == spelled


def test_a_preset_takes_no_options() -> None:
    with pytest.raises(UsageError, match="fast is a preset without options: write simplify,quantize, with yours"):
        parse("fast{scheme=static}", REGISTRY)


@pytest.mark.parametrize("name", PRESETS)
def test_no_pass_has_the_name_of_a_preset(name: str) -> None:
    assert name not in REGISTRY
    with pytest.raises(UsageError, match=f"{name!r} is a preset, and no pass has its name: choose another"):
        type("Mine", (Pass,), {"name": name, "stage": Stage.SIMPLIFY})


def test_the_first_of_several_bits_must_be_there() -> None:
    assert str(Quantize(bits=[4, 8])) == "quantize{bits=[4,8]}"  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="quantize: bits is empty; give 8, 7, 4 or 2"):
        Quantize(bits=())


def test_a_package_that_registers_the_name_of_a_preset_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("fast", "clipping:Fast", "graphopt.passes")
    monkeypatch.setitem(REGISTRY.__dict__, "added", {"fast": [entry]})
    assert "fast" not in REGISTRY and "fast" not in list(REGISTRY) and len(REGISTRY) == len(list(REGISTRY))
    assert REGISTRY.why_unused("fast") == "that of package an unknown distribution is not used: it needs another name"
    with pytest.raises(UsageError, match="there is no pass 'fast'"):
        REGISTRY.lookup("fast")
    with pytest.warns(UserWarning, match=r"pass 'fast' is a preset of graphopt; that of package .* is not used"):
        assert str(parse("fast", REGISTRY)) == PRESETS["fast"].text
