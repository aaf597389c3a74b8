"""The axes of a mesh, and a training of two processes: its steps are those of one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt.errors import UsageError
from graphopt.training.meshes import MeshSizes, opened
from tests.training.meshes.launch import launch


@given(copies=st.integers(1, 8), axis=st.sampled_from(["fsdp", "tp", "pp"]), parts=st.integers(1, 8))
def test_a_mesh_is_its_text(copies: int, axis: str, parts: int) -> None:
    sizes = {"dp": copies, axis: parts}
    found = MeshSizes.parse(",".join(f"{name}={size}" for name, size in sizes.items()))
    assert MeshSizes.parse(str(found)) == found
    assert found.total == math.prod(sizes.values())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "give axes"),
        ("dp", "whole number"),
        ("dp=0", "whole number"),
        ("dp=two", "whole number"),
        ("ddp=2", "did you mean 'dp'"),
        ("dp=2,dp=2", "twice"),
        ("fsdp=2,pp=2", "one of them"),
    ],
)
def test_a_wrong_text_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        MeshSizes.parse(text)


def test_one_process_is_no_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert opened(None) is None and opened("dp=1") is None
    with pytest.raises(UsageError, match=r"takes 2 processes, and there is 1: .*torchrun --nproc-per-node 2"):
        opened("dp=2")


def test_processes_without_an_address_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="WORLD_SIZE=2, and no RANK"):
        opened("dp=2")


def trained(mesh: str | None, accumulate: int, amp: str = "off") -> tuple[list[float], dict[str, list[float]]]:
    """The losses of a distillation of a pruned perceptron, whose batches are no multiple of the ranks, and its
    weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).double().eval()
    draw = torch.Generator().manual_seed(1)
    data = [(torch.randn(4, 6, generator=draw).double(),) for _ in range(5)]
    passes = f"prune{{neurons=0.5}},distill{{epochs=2 lr=0.05 optimizer=sgd amp={amp} accumulate={accumulate}}}"
    small = graphopt.optimize(
        net, passes, target="torch-cpu", training=data, measure=False, mesh=mesh, example_inputs=data[0][0]
    )
    record = next(one for one in small.report.passes if one.name == "distill")
    state = {name: one.flatten().tolist() for name, one in small.module.state_dict().items()}
    return [line["loss"] for line in record.training], state


def test_two_processes_take_the_steps_of_one() -> None:
    """Data parallel on two ranks is one process that accumulates two batches, on every rank; the last step of each
    epoch has a batch for one of them only."""
    losses, state = trained(None, 2)
    for answer in launch(2, trained, "dp=2", 1):
        assert not isinstance(answer, str), answer
        assert answer[0] == pytest.approx(losses, rel=1e-9)
        assert all(answer[1][name] == pytest.approx(one, rel=1e-9) for name, one in state.items())


@pytest.mark.slow
def test_ranks_train_in_the_precision_that_the_first_has_timed() -> None:
    first, second = launch(2, trained, "dp=2", 1, "auto")
    assert not isinstance(first, str) and first[1] == second[1]
