"""DeepSpeed's ZeRO on two processes, as an Accelerator with a DeepSpeedPlugin prepares it: the steps of one process."""

from __future__ import annotations

import os
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import UsageError
from tests.training.meshes.launch import launch

pytest.importorskip("deepspeed")
accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.slow

LONGEST = 1800.0
"""Seconds that compiling DeepSpeed's kernel takes at most; an older lock is of a process that was killed."""


@pytest.fixture(scope="module", autouse=True)
def _unlocked() -> None:
    """DeepSpeed would wait for the lock of a process that was killed while it compiled."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(root) if root else Path.home() / ".cache" / "torch_extensions"
    for lock in folder.glob("**/deepspeed_*/lock"):
        if time.time() - lock.stat().st_mtime > LONGEST:
            warnings.warn(f"{lock} is left of a process that was killed: it is removed", stacklevel=1)
            lock.unlink()


PASSES = {
    "cut": "prune{neurons=0.5},low-rank{energy=0.6},distill{OPTIONS}",
    "sparse": "sparsify{pattern=2:4},finetune{OPTIONS}",
}
"""Pipelines; OPTIONS are those of the training."""


class Net(nn.Module):
    """x (batch, 8) -> (batch, 4), by two blocks that scale what they read by one and the same vector."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.LayerNorm(8)) for _ in range(2)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x * self.scale)
        found: Tensor = self.head(x)
        return found


def trained(how: str, options: str, **settings: Any) -> tuple[list[float], dict[str, list[float]]]:
    """The losses of the steps on six batches, and the weights by name."""
    torch.manual_seed(0)
    net = Net().eval()
    draw = torch.Generator().manual_seed(1)
    data = [(torch.randn(4, 8, generator=draw), torch.arange(4)) for _ in range(6)]
    small = graphopt.optimize(
        net, PASSES[how].replace("OPTIONS", f"epochs=2 lr=0.01 {options}"), target="torch-cpu", training=data,
        measure=False, example_inputs=data[0][0], **settings,
    )  # fmt: skip
    record = next(one for one in small.report.passes if one.training)
    state = {name: one.flatten().tolist() for name, one in small.transformed.constants() if one.is_floating_point()}
    return [line["loss"] for line in record.training], state


def _engine(stage: int, **given: Any) -> Any:
    plugin = accelerate.DeepSpeedPlugin(zero_stage=stage, **given)
    gloo = accelerate.InitProcessGroupKwargs(backend="gloo")
    return accelerate.Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[gloo])


def zero(stage: int, cases: list[tuple[str, str]]) -> list[Any]:
    """One training after the other, with one Accelerator, which is as it was behind them."""
    accelerator = _engine(stage)
    before = str(accelerator.state.deepspeed_plugin.deepspeed_config)
    found = [trained(how, options, accelerator=accelerator) for how, options in cases]
    assert str(accelerator.state.deepspeed_plugin.deepspeed_config) == before
    assert accelerator.gradient_accumulation_steps == 1 and not accelerator._models
    return found


CASES = [("cut", "accumulate=2 optimizer=sgd clip=0.1"), ("cut", ""), ("sparse", "")]
ALONE = [("cut", "accumulate=4 optimizer=sgd clip=0.1"), ("cut", "accumulate=2"), ("sparse", "accumulate=2")]
"""In one process, which accumulates what two have."""


@cache
def _alone() -> list[Any]:
    return [trained(*case) for case in ALONE]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_takes_the_steps_of_one_process(stage: int) -> None:
    for answer in launch(2, zero, stage, CASES):
        assert not isinstance(answer, str), answer
        for case, (losses, weights), (expected, expected_weights) in zip(CASES, answer, _alone(), strict=True):
            assert losses == pytest.approx(expected, rel=1e-4), case
            for name, one in expected_weights.items():
                assert weights[name] == pytest.approx(one, rel=1e-3, abs=1e-4), (case, name)


def test_zeros_stay() -> None:
    for answer in launch(2, zero, 3, [("sparse", "")]):
        assert not isinstance(answer, str), answer
        for name, one in _alone()[2][1].items():
            assert [x == 0 for x in answer[0][1][name]] == [x == 0 for x in one], name


def refused(what: str, folder: Path) -> str:
    given: dict[str, Any] = {"gradient_clipping": 0.5} if what == "clip" else {}
    accelerator = accelerate.Accelerator(
        deepspeed_plugin=accelerate.DeepSpeedPlugin(zero_stage=2, **given), cpu=what == "cpu",
        mixed_precision="bf16" if what == "bf16" else "no",
        kwargs_handlers=[] if what == "group" else [accelerate.InitProcessGroupKwargs(backend="gloo")],
    )  # fmt: skip
    options = {"clip": "clip=2.0", "amp": "amp=bfloat16"}.get(what, "")
    with pytest.raises(UsageError) as caught:
        trained("sparse", options, accelerator=accelerator, checkpoint=folder if what == "checkpoint" else None)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("cpu", "asked for DEEPSPEED, and has made it DDP in silence"),
        ("group", "there are 2 processes, and the accelerator counts 1: give it kwargs_handlers="),
        ("bf16", "mixed_precision='bf16' makes DeepSpeed round the weights"),
        ("amp", "amp=bfloat16 is not for DeepSpeed"),
        ("clip", "finetune has clip=2.0, and the accelerator gradient_clipping=0.5"),
        ("checkpoint", "DeepSpeed's state is in pickles"),
    ],
)
def test_what_is_refused(what: str, said: str, tmp_path: Path) -> None:
    for answer in launch(2, refused, what, tmp_path):
        assert said in answer
