"""`graphopt optimize model.pt2 -o small.pt2`, for the targets of PyTorch."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphopt.dialects.fx.graph import FxGraph
from tests.cli.test_cli import done, refused


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.fc1(x).relu())
        return y


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Model().eval(), (torch.randn(2, 16),), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


def test_an_archive_is_optimized(archive: Path, tmp_path: Path) -> None:
    passes = ("--passes", "quantize{scheme=dynamic}", "--target", "fbgemm")
    text = done("optimize", archive, "-o", tmp_path / "small.pt2", *passes)
    assert "written: " in text
    small = FxGraph.load(tmp_path / "small.pt2")
    x = torch.randn(5, 16)
    expected = torch.export.load(archive).module()(x)
    (found,) = small.evaluate({"x": x}, small.outputs)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.slow
def test_an_archive_is_compiled(archive: Path, tmp_path: Path) -> None:
    done("optimize", archive, "-o", tmp_path / "small.pt2", "--target", "fbgemm", "--aot")
    x = torch.randn(5, 16)
    found = torch._inductor.aoti_load_package(str(tmp_path / "small.pt2"))(x=x)
    torch.testing.assert_close(found, torch.export.load(archive).module()(x), rtol=1e-5, atol=1e-5)


def test_pickles_are_refused(archive: Path, tmp_path: Path) -> None:
    program = torch.export.load(archive)
    program._example_inputs = ((torch.ones(2, 16),), {"x": Path("kept as a pickle")})
    torch.export.save(program, tmp_path / "pickled.pt2")
    line = refused(1, "optimize", tmp_path / "pickled.pt2", "-o", tmp_path / "small.pt2", "--target", "fbgemm")
    assert "holds pickles (data/sample_inputs/model.pt), which can run code and are never loaded" in line
    (tmp_path / "text.pt2").write_text("no archive")
    line = refused(1, "optimize", tmp_path / "text.pt2", "-o", tmp_path / "small.pt2", "--target", "fbgemm")
    assert "is no archive of torch.export" in line
    assert not (tmp_path / "small.pt2").exists()


def test_a_second_model_in_an_archive_is_refused(archive: Path, tmp_path: Path) -> None:
    """torch reads each of them, with weights that its own config may call pickles."""
    with zipfile.ZipFile(archive) as given, zipfile.ZipFile(tmp_path / "two.pt2", "w") as made:
        for name in given.namelist():
            made.writestr(name, given.read(name))
        made.writestr(given.namelist()[0].partition("/")[0] + "/models/a-b.json", b"{}")
    line = refused(1, "optimize", tmp_path / "two.pt2", "-o", tmp_path / "small.pt2", "--target", "fbgemm")
    assert "holds pickles (models/a-b.json)" in line
