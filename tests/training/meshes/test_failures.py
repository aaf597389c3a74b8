"""What goes wrong among processes is an error on all of them, and a training goes on from its checkpoint."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.ir.graph import Graph
from graphopt.pipeline import Pass, Stage
from graphopt.pipeline.context import Context
from graphopt.result import versions
from tests.training.meshes import models
from tests.training.meshes.launch import launch
from tests.training.meshes.models import Trained

pytestmark = pytest.mark.slow


def _loss(at: int, what: str) -> Any:
    """Cross-entropy, which does something at its n-th call: on every rank, or on rank 1 alone."""
    calls = 0

    def loss(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at and what == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if calls == at and os.environ.get("RANK") == "1":
            if what == "die":
                os._exit(9)
            if what == "raise":
                raise ValueError("no such label")
        return nn.functional.cross_entropy(outputs["logits"], batch["labels"])

    return loss


def run(how: str, mesh: str | None, accumulate: int, folder: Path | None, at: int = 0, what: str = "") -> Trained:
    return models.trained("bert", how, mesh, accumulate, checkpoint=folder, loss=_loss(at, what))


@pytest.fixture(scope="module")
def unbroken() -> Trained:
    return run("neurons", None, 4, None)


@pytest.mark.parametrize("mesh", ["fsdp", "tp", "pp"])
def test_saved_by_two_processes_and_resumed_by_one_and_four(mesh: str, unbroken: Trained, tmp_path: Path) -> None:
    """fsdp ranks have their own batches, so that they accumulate fewer; four of tp cut four heads, and of pp there are
    two stages in two copies."""
    (tmp_path / "two").mkdir()
    own = 2 if mesh == "fsdp" else 4
    broken = launch(2, run, "neurons", f"{mesh}=2", own, tmp_path / "two", 9, "interrupt")
    assert not isinstance(broken[0], str), broken[0]
    assert 0 < len(broken[0][0]) < 20
    files = [file.name for file in (tmp_path / "two").rglob("*") if file.is_file()]
    assert any(".shards" in str(file) for file in (tmp_path / "two").iterdir())
    assert {Path(name).suffix for name in files if name != ".lock"} <= {".safetensors", ".json", ".jsonl"}
    copies = tmp_path / "four"
    _copy(tmp_path / "two", copies)
    four = {"fsdp": ("fsdp=4", 1), "tp": ("tp=4", 4), "pp": ("dp=2,pp=2", 2)}[mesh]
    for found in (run("neurons", None, 4, tmp_path / "two"), launch(4, run, "neurons", *four, copies)[0]):
        assert not isinstance(found, str), found
        assert len(found[0]) == 20
        assert found[0] == pytest.approx(unbroken[0], rel=1e-5)


class Narrow(nn.Module):
    """x (batch, 6) -> (batch, 4), by two blocks of a width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5)) for _ in range(2))
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        found: Tensor = self.last(x)
        return found


def projected(mesh: str | None, folder: Path | None = None, at: tuple[int, ...] = (0,)) -> list[float]:
    """The losses of twelve steps towards a wider teacher, in as many calls as `at` has numbers: each is interrupted at
    that batch, and 0 is not. Hidden states are compared by projections, which are trained along."""
    torch.manual_seed(0)
    net, teacher = Narrow(8).double().eval(), Narrow(12).double().eval()
    draw = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(4, 6, generator=draw).double(), "labels": torch.arange(4)} for _ in range(4)]
    found: list[float] = []
    for number in at:
        own = _loss(number, "interrupt")

        def loss(outputs: Tensor, batch: dict[str, Tensor], own: Any = own) -> Tensor:
            found: Tensor = own({"logits": outputs}, batch)
            return found

        small = graphopt.optimize(
            net, "distill{steps=12 alpha=0.5 hidden=0.5 lr=0.05 accumulate=2}", target="torch-cpu", training=data,
            example_inputs=data[0]["x"], measure=False, mesh=mesh, checkpoint=folder, teacher=teacher, agree=False,
            loss=loss,
        )  # fmt: skip
        found = [line["loss"] for one in small.report.passes for line in one.training]
        assert (len(found) == 12) == (number == 0), "interrupted too late, or not at all"
    return found


def unbroken_and_resumed(mesh: str, folder: Path) -> tuple[list[float], list[float]]:
    return projected(mesh), projected(mesh, folder, (7, 5, 0))


def test_each_rank_goes_on_from_what_is_its_own(tmp_path: Path) -> None:
    """The last stage alone trains projections, and each stage draws its own dropout. The second checkpoint is of a
    training that was resumed."""
    for answer in launch(2, unbroken_and_resumed, "pp=2", tmp_path / "state"):
        assert not isinstance(answer, str), answer
        whole, resumed = answer
        assert resumed == pytest.approx(whole, rel=1e-9)


def _copy(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".lock"))


def short(folder: Path, at: int = 0, what: str = "") -> list[float]:
    """Twelve steps of a perceptron, with a checkpoint behind each."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    data = [{"input": torch.randn(4, 6), "labels": torch.arange(4)} for _ in range(4)]
    loss = _loss(at, what)
    small = graphopt.optimize(
        net, "prune{neurons=0.5},finetune{steps=12 lr=0.05 checkpoint_minutes=1e-6}", target="torch-cpu",
        training=data, example_inputs=data[0]["input"], measure=False, mesh="dp=2", checkpoint=folder,
        loss=lambda outputs, batch: loss({"logits": outputs}, batch),
    )  # fmt: skip
    return [line["loss"] for one in small.report.passes for line in one.training]


def test_a_rank_that_dies_ends_the_others_and_the_call_goes_on(tmp_path: Path) -> None:
    told, code = launch(2, short, tmp_path / "state", 6, "die")
    assert code == 9
    assert "RankError: a process of the mesh dp=2 has ended, or does not answer" in told
    resumed = launch(2, short, tmp_path / "state")
    whole = launch(2, short, tmp_path / "other")
    assert len(whole[0]) == 12
    assert resumed[0] == pytest.approx(whole[0], rel=1e-6)


def test_the_others_hear_why_a_rank_failed(tmp_path: Path) -> None:
    first, second = launch(2, short, tmp_path / "state", 3, "raise")
    assert "UsageError: your loss function failed: ValueError: no such label" in second
    assert "RankError: rank 1 failed: Traceback" in first and "no such label" in first


@dataclass(frozen=True)
class Uneven(Pass):
    """linear(x, W)  ->  linear(x, W + rank)"""

    name, stage = "uneven", Stage.PRUNE

    def run(self, graph: Graph, context: Context) -> None:
        for site in graph.sites("linear"):
            assert site.weight is not None
            weight = graph.add_constant(site.weight + int(os.environ["RANK"]))
            graph.replace(site, graph.emit("linear", site.input, weight, site.bias, at=site))


def different(what: str) -> None:
    """A call that is not the same on both ranks."""
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank if what == "model" else 0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    torch.manual_seed(rank if what == "data" else 0)
    data = [(torch.randn(4, 6), torch.arange(4)) for _ in range(4)]
    amount = 0.25 * (1 + rank) if what == "pipeline" else 0.5
    passes = [Uneven()] if what == "pass" else f"prune{{neurons={amount}}},finetune{{steps=2}}"
    training = None if what == "pass" else data
    with pytest.raises(graphopt.RankError) as caught:
        graphopt.optimize(
            net, passes, target="torch-cpu", training=training, example_inputs=torch.ones(2, 6), measure=False,
            agree=False,
        )  # fmt: skip
    raise caught.value


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("model", "the captured model differs between ranks"),
        ("data", "the training data differs between ranks"),
        ("pipeline", "the pipeline differs between ranks"),
        ("pass", "the graph after uneven differs between ranks"),
    ],
)
def test_ranks_must_do_the_same(what: str, said: str) -> None:
    for answer in launch(2, different, what):
        assert said in answer


@pytest.mark.parametrize(
    ("mesh", "said"), [("tp=3", "tp=3 does not divide the 2 heads"), ("pp=3", "it has 2 repeated blocks")]
)
def test_a_mesh_that_does_not_divide_the_model(mesh: str, said: str) -> None:
    for answer in launch(3, run, "cut", mesh, 1, None):
        assert "UsageError" in answer and said in answer


def of_other_version() -> None:
    """A call whose second rank has another torch."""
    own = versions() | {"torch": f"2.{os.environ['RANK']}"}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(graphopt.RankError) as caught:
        patch.setattr("graphopt.api.versions", lambda: own)
        graphopt.optimize(nn.Linear(2, 2).eval(), target="torch-cpu", example_inputs=torch.ones(1, 2), mesh="dp=2")
    raise caught.value


def test_ranks_of_different_versions() -> None:
    for answer in launch(2, of_other_version):
        assert "the version of torch differs between ranks: rank 0 has 2.0, and rank 1 has 2.1; start all" in answer


def alone() -> str:
    """A rank whose other never comes."""
    from datetime import timedelta

    from graphopt.training.meshes import mesh

    mesh.RENDEZVOUS = timedelta(seconds=1)
    os.environ["WORLD_SIZE"] = "2"
    with pytest.raises(graphopt.UsageError) as caught:
        graphopt.optimize(nn.Linear(2, 2).eval(), target="torch-cpu", example_inputs=torch.ones(1, 2), mesh="dp=2")
    return str(caught.value)


def test_processes_that_do_not_find_each_other() -> None:
    (said,) = launch(1, alone)
    assert "\n" not in said and "2 processes do not find each other at 127.0.0.1:" in said
    assert "start all of them by torchrun" in said
