"""Presets on a model: what each does to every layer, and that the report spells it out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt import Optimized
from graphopt.numerics import metrics

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    """A conv, a linear whose inputs fit blocks, and one whose 133 inputs fit none."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(128, 133), nn.ReLU(), nn.Linear(133, 10))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), head).eval()


def optimized(preset: str, calibrated: bool, target: str = "onnxruntime") -> Optimized:
    calibration = [X] if calibrated else None
    return graphopt.optimize(
        network(), preset, example_inputs=X, calibration=calibration, target=target, measure=False
    )


def bits(small: Optimized) -> dict[str, int]:
    """Of each stored weight that is dequantized, by the path of its layer."""
    graph = small.transformed
    found = {}
    for site in graph.sites("linear", "conv"):
        weight = site.required("weight").producer
        if weight is not None and weight.kind == "dequantize":
            found[site.label] = int(weight.attributes["bits"])
    return found


@pytest.mark.parametrize("calibrated", [False, True])
def test_safe_loses_nothing(calibrated: bool) -> None:
    small = optimized("safe", calibrated)
    assert small.report.pipeline == "simplify,fold-int8" and bits(small) == {}
    torch.testing.assert_close(small(X), network()(X), rtol=1e-4, atol=1e-5)


def test_fast_takes_its_scheme_from_the_data() -> None:
    dynamic, static = optimized("fast", False), optimized("fast", True)
    assert dynamic.report.pipeline == static.report.pipeline == "simplify,quantize,fold-int8"
    assert set(bits(dynamic)) == {"4.0", "4.2"} and set(bits(static)) == {"0", "4.0", "4.2"}
    assert [reason.code for reason in dynamic.report.passes[1].declined.values()] == ["no_kernel_uncalibrated"]


@pytest.mark.parametrize("calibrated", [False, True])
def test_small_takes_four_bits_where_blocks_fit(calibrated: bool) -> None:
    small = optimized("small", calibrated)
    assert small.report.pipeline.startswith("simplify,quantize{scheme=weight-only bits=[4,8]},quantize,")
    weights = bits(small)
    assert (weights["4.0"], weights["4.2"]) == (4, 8) and ("0" in weights) == calibrated
    assert metrics.sqnr(network()(X), small(X)) > 15


@pytest.mark.parametrize("target", ["fbgemm", "cuda"])
def test_small_runs_where_there_are_no_kernels_for_four_bits(target: str) -> None:
    assert set(bits(optimized("small", False, target)).values()) <= {7, 8}
