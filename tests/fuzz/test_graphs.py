"""Random models, in a run that is short and always the same; `make fuzz` runs on with others."""

from __future__ import annotations

import onnx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz import properties
from tests.fuzz.onnx_graphs import OPSETS, Array, models

SHORT = settings(max_examples=25, derandomize=True, deadline=None, database=None,
                 suppress_health_check=list(HealthCheck), phases=(Phase.generate,))  # fmt: skip


@SHORT
@given(models())
def test_simplify_keeps_the_numbers(drawn: tuple[onnx.ModelProto, dict[str, Array]]) -> None:
    properties.simplify_keeps_the_numbers(*drawn)


@SHORT
@given(models(), st.sampled_from(OPSETS))
def test_export_at_any_opset(drawn: tuple[onnx.ModelProto, dict[str, Array]], opset: int) -> None:
    properties.export_at(opset, *drawn)
