"""A user's Accelerator: what it says becomes options, and a training through its DDP takes the steps of one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt.errors import UsageError
from graphopt.passes.recover.finetune import FineTune
from tests.training.meshes.launch import launch

accelerate = pytest.importorskip("accelerate")

from graphopt.training.meshes.accelerated import PRECISIONS, agreed, mesh_of  # noqa: E402

Answer = tuple[list[float], dict[str, list[float]], str]
"""The losses of the steps, the weights by name, and the text of the pipeline."""


def made(**options: Any) -> Any:
    """An Accelerator on the CPU; what earlier ones have left in the process is forgotten."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)
    return accelerate.Accelerator(**{"cpu": True, **options})


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    made()


def _passes(options: str) -> str:
    return f"prune{{neurons=0.5}},finetune{{epochs=2 lr=0.05 optimizer=sgd {options}}}"


def trained(options: str, *, accelerator: Any = None, checkpoint: Path | None = None, **settings: Any) -> Answer:
    """Five batches of a perceptron in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).double().eval()
    draw = torch.Generator().manual_seed(1)
    data = [(torch.randn(4, 6, generator=draw).double(), torch.arange(4)) for _ in range(5)]
    small = graphopt.optimize(
        net, _passes(options), target="torch-cpu", training=data, measure=False, example_inputs=data[0][0],
        accelerator=accelerator, checkpoint=checkpoint, **settings,
    )  # fmt: skip
    record = next(one for one in small.report.passes if one.name == "finetune")
    state = {name: one.flatten().tolist() for name, one in small.module.state_dict().items()}
    return [line["loss"] for line in record.training], state, small.report.pipeline


def ddp(options: str, folder: Path | None = None, **given: Any) -> Answer:
    found = made(**given)
    assert found.distributed_type.value == "MULTI_CPU"
    answer = trained(options, accelerator=found, checkpoint=folder)
    assert not found._models, "what graphopt has wrapped is not the user's to save"
    return answer


# --- options ---------------------------------------------------------------------------------------------------------


@given(
    precision=st.sampled_from(["no", "bf16"]),
    steps=st.integers(1, 4),
    amp=st.sampled_from(["off", "bfloat16", "auto"]),
    accumulate=st.integers(1, 4),
)
def test_what_either_says_counts_and_where_both_do_they_agree(
    precision: str, steps: int, amp: Any, accumulate: int
) -> None:
    accelerator = made(mixed_precision=precision, gradient_accumulation_steps=steps)
    own = FineTune(amp=amp, accumulate=accumulate)
    asked = PRECISIONS[precision]
    differ = [
        name for name, mine, theirs, plain in (("amp", amp, asked, "off"), ("accumulate", accumulate, steps, 1))
        if mine not in (theirs, plain) and theirs != plain
    ]  # fmt: skip
    if differ:
        with pytest.raises(UsageError, match=f"finetune has {differ[0]}=.*, and the accelerator .*: leave one"):
            agreed(own, accelerator)
        return
    found = agreed(own, accelerator)
    assert found.amp == (amp if amp != "off" else asked)
    assert found.accumulate == max(accumulate, steps)
    assert found.device == "cpu"


def test_one_process_takes_precision_and_accumulation() -> None:
    losses, _, pipeline = trained("", accelerator=made(gradient_accumulation_steps=2))
    assert "accumulate=2" in pipeline
    assert losses == trained("accumulate=2")[0]
    assert "amp=bfloat16" in trained("", accelerator=made(mixed_precision="bf16"))[2]


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_options", "mesh", "said"),
    [
        ({}, "dp=1", "both say how the run is spread"),
        ({"fsdp_plugin": "FullyShardedDataParallelPlugin"}, None, 'asked for FSDP.* in silence.*give mesh="fsdp=N"'),
        ({"dynamo_backend": "inductor"}, None, "dynamo_backend"),
    ],
)
def test_what_an_accelerator_cannot_be(given_options: dict[str, Any], mesh: str | None, said: str) -> None:
    if "fsdp_plugin" in given_options:
        given_options = {"fsdp_plugin": accelerate.FullyShardedDataParallelPlugin()}
    with pytest.raises(UsageError, match=said):
        mesh_of(made(**given_options), mesh)


def test_what_is_no_accelerator() -> None:
    with pytest.raises(UsageError, match=r"accelerator is a str; give an accelerate\.Accelerator"):
        trained("", accelerator="auto")


def test_an_accelerator_that_does_not_see_the_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = made()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"there are 2 processes, and the accelerator counts 1: .*cpu=True"):
        mesh_of(accelerator, None)


# --- two processes ---------------------------------------------------------------------------------------------------


def _same(answers: list[Any], expected: Answer) -> None:
    for answer in answers:
        assert not isinstance(answer, str), answer
        assert answer[0] == pytest.approx(expected[0], rel=1e-9)
        for name, one in expected[1].items():
            assert answer[1][name] == pytest.approx(one, rel=1e-9), name


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one() -> None:
    """The last step of each epoch has a batch for one of them only."""
    _same(launch(2, ddp, ""), trained("accumulate=2"))


@pytest.mark.slow
def test_accumulated_batches_are_summed_once() -> None:
    _same(launch(2, ddp, "", gradient_accumulation_steps=2), trained("accumulate=4"))


def interrupted(folder: Path) -> Any:
    ddp("steps=2", folder)
    return ddp("steps=2", folder)


@pytest.mark.slow
def test_a_training_through_an_accelerator_is_kept_and_resumed(tmp_path: Path) -> None:
    _same(launch(2, interrupted, tmp_path / "state"), trained("accumulate=2 steps=2"))


def sharded() -> str:
    with pytest.raises(UsageError) as caught:
        trained("", accelerator=made(fsdp_plugin=accelerate.FullyShardedDataParallelPlugin()))
    return str(caught.value)


@pytest.mark.slow
def test_fsdp_on_a_cpu_is_no_silent_ddp() -> None:
    for said in launch(2, sharded):
        assert "the accelerator was asked for FSDP, and has made it DDP in silence" in said


def prepared() -> str:
    accelerator = made()
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(16, 6), torch.arange(16) % 4)
    loader = accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=4))
    with pytest.raises(UsageError) as caught:
        graphopt.optimize(
            nn.Linear(6, 4).eval(), "finetune{steps=1}", target="torch-cpu", training=loader, measure=False,
            example_inputs=torch.ones(2, 6), accelerator=accelerator,
        )  # fmt: skip
    return str(caught.value)


@pytest.mark.slow
def test_a_loader_that_is_cut_already_is_refused() -> None:
    for said in launch(2, prepared):
        assert "training= was prepared by an Accelerator" in said


def timed_apart() -> str:
    with pytest.raises(UsageError) as caught:
        ddp("amp=auto")
    return str(caught.value)


@pytest.mark.slow
def test_no_process_times_steps_that_all_take() -> None:
    for said in launch(2, timed_apart):
        assert "amp=auto with an accelerator of 2 processes" in said
