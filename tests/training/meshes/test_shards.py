"""What cuts tensors over processes and makes them whole again: nothing is lost, whatever their shapes, and what some
processes have written, others in another mesh read."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from graphopt.capture.sources import capture
from graphopt.dialects.fx.graph import FxGraph
from graphopt.dialects.fx.module import TrainableModule
from graphopt.training.meshes import Mesh, opened, shards
from graphopt.training.meshes.mesh import MeshSizes
from graphopt.training.meshes.sharded import Sharded
from graphopt.training.meshes.spread import Spread
from graphopt.training.meshes.stages import Stages
from graphopt.training.meshes.tensor_parallel import TensorParallel
from tests.training.meshes.launch import launch

pytestmark = pytest.mark.slow

SHAPES = st.lists(st.integers(1, 7), max_size=3).map(tuple)

FEW = settings(derandomize=True, database=None, max_examples=12, deadline=None)
"""Every process draws the same examples."""


def blocks(shapes: list[tuple[int, ...]], tied: bool) -> TrainableModule:
    """A module of four blocks; each adds the sums of its parameters, of these shapes, to its input. tied: whether the
    first and the last read one more."""
    root, graph = nn.Module(), fx.Graph()
    root.register_module("layers", nn.ModuleList(nn.Module() for _ in range(4)))
    x = graph.placeholder("x")
    for block in range(4):
        own = [f"layers.{block}.p{place}" for place in range(len(shapes))]
        for name, shape in zip(own, shapes, strict=True):
            root.get_submodule(f"layers.{block}").register_parameter(
                name.rpartition(".")[2], nn.Parameter(torch.randn(shape))
            )
        if tied and block in (0, 3):
            own.append("embedding")
        for name in own:
            where = {"nn_module_stack": {"": (f"layers.{block}", nn.Module)}}
            if name == "embedding" and block == 0:
                root.register_parameter(name, nn.Parameter(torch.randn(5, 3)))
            read = graph.get_attr(name)
            x = graph.call_function(torch.add, (x, graph.call_function(torch.sum, (read,))))
            for node in (read, x, *x.all_input_nodes):
                if node.op != "placeholder":
                    node.meta.setdefault("nn_module_stack", where["nn_module_stack"])
    graph.output((x,))
    return TrainableModule(root, graph)


def spread_over(kind: str, mesh: Mesh, module: TrainableModule) -> Spread:
    names = [name for name, _ in module.named_parameters()]
    return Sharded(module, names, mesh) if kind == "fsdp" else Stages(module, names, mesh)


def _same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], one) for name, one in expected.items())


def _require(mesh: Mesh, **held: bool) -> None:
    """On every process, that these hold on every process."""
    assert mesh.gather(held) == [dict.fromkeys(held, True)] * mesh.world


def _written(spread: Spread, mesh: Mesh, read: Mapping[str, Spread]) -> None:
    """What a spread writes, others read: each the part that it has; and a single process all of it."""
    parts = spread.tensors
    stored = {f"module/{name}": one for name, one in spread.stored(parts).items()}
    folder = Path(mesh.first(tempfile.mkdtemp))
    files = shards.write(folder, "0-law", mesh, stored)
    for other in read.values():
        found = shards.read(folder, files, other)
        own = {f"module/{name}": one for name, one in other.tensors.items()}
        _require(mesh, reads=_same(found, own))
    whole = spread.wholes(parts)

    def alone() -> bool:
        found = shards.read(folder, files, Spread(nn.Module(), ()))
        return _same(found, {f"module/{name}": one for name, one in whole.items()})

    _require(mesh, alone=mesh.first(alone))


def parts_and_wholes(kind: str) -> str:
    """Over four processes, and over two in two copies."""
    opened("dp=4")
    four, two = (Mesh(MeshSizes.parse(text)) for text in (f"{kind}=4", f"dp=2,{kind}=2"))

    @FEW
    @given(shapes=st.lists(SHAPES, min_size=1, max_size=3), tied=st.booleans(), seed=st.integers(0, 9))
    def law(shapes: list[tuple[int, ...]], tied: bool, seed: int) -> None:
        spreads, wholes = {}, {}
        for mesh in (four, two):
            torch.manual_seed(seed)
            module = blocks(shapes, tied)
            wholes = {name: one.detach().clone() for name, one in module.named_parameters()}
            spreads[str(mesh)] = spread = spread_over(kind, mesh, module)
            cut = {name: spread.part(name, one) for name, one in wholes.items()}
            held = {name: one for name, one in cut.items() if one is not None}
            _require(mesh, parts=_same(spread.tensors, held), merged=_same(spread.wholes(spread.tensors), wholes))
        _written(spreads[str(four)], four, spreads)
        _written(spreads[str(two)], two, spreads)

    law()
    return "done"


@pytest.mark.parametrize("kind", ["fsdp", "pp"])
def test_merging_what_was_cut_gives_it_back(kind: str) -> None:
    assert launch(4, parts_and_wholes, kind) == ["done"] * 4


def parts_of_layers() -> str:
    opened("dp=4")
    four, two = (Mesh(MeshSizes.parse(text)) for text in ("tp=4", "dp=2,tp=2"))

    @settings(FEW, max_examples=4)
    @given(
        width=st.integers(1, 6), neurons=st.integers(1, 4).map((4).__mul__), outputs=st.integers(1, 5),
        has_bias=st.booleans(),
    )  # fmt: skip
    def law(width: int, neurons: int, outputs: int, has_bias: bool) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(width, neurons, bias=has_bias), nn.ReLU(), nn.Linear(neurons, outputs, bias=has_bias)
        ).eval()
        graph = capture(net, "fx", example_inputs=torch.ones(2, width)).graph
        assert isinstance(graph, FxGraph)
        spreads: dict[str, Any] = {}
        for mesh in (four, two):
            module = graph.module(tuple)
            wholes = {name: one.detach().clone() for name, one in module.named_parameters()}
            spread = TensorParallel(graph, module, (), list(wholes), mesh, learn_scales=False)
            spreads[str(mesh)] = spread
            assert spread.made.cuts
            held = {name: one for name in wholes if (one := spread.part(name, wholes[name])) is not None}
            _require(mesh, parts=_same(spread.tensors, held), merged=_same(spread.wholes(spread.tensors), wholes))
        _written(spreads["tp=4"], four, spreads)

    law()
    return "done"


def test_merging_layers_that_were_cut_gives_them_back() -> None:
    assert launch(4, parts_of_layers) == ["done"] * 4
