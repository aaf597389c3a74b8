"""Weights that stay in files: mapped while they are read and no longer, spilled when added, written in turn."""

from __future__ import annotations

import ctypes
import errno
import gc
import io
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from graphopt.dialects.onnx import export as onnx_export
from graphopt.dialects.onnx import files as onnx_files
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import GraphError
from graphopt.ir import cost
from graphopt.ir.cost import Cost
from graphopt.ir.graph import digest
from tests.dialects.fx.test_graph import normal
from tests.models import model

ROOT = Path(__file__).resolve().parents[3]

WIDTH = 64
NBYTES = WIDTH * WIDTH * 4


class Mappings:
    """Which mappings of weights are alive, and how many were at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive = self.most = self.read = 0
        original = onnx_files.WeightFile.read

        def counted(file: onnx_files.WeightFile, *where: Any) -> Any:
            found = original(file, *where)
            self.alive, self.read = self.alive + 1, self.read + 1
            self.most = max(self.most, self.alive)
            array = found.numpy()  # views of it hold what lies under it: the mapping
            while isinstance(array.base, np.ndarray):
                array = array.base
            weakref.finalize(array.base.obj if isinstance(array.base, memoryview) else array.base, self._gone)
            return found

        monkeypatch.setattr(onnx_files.WeightFile, "read", counted)

    def _gone(self) -> None:
        self.alive -= 1


@pytest.fixture
def mappings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mappings]:
    """Counts mappings, with the collector off: a tensor's pages must go with its last reference."""
    gc.collect()
    gc.disable()
    yield Mappings(monkeypatch)
    gc.enable()


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model of four layers counts as large; returns the folder where temporary files go."""
    monkeypatch.setattr(cost, "LARGE", NBYTES)
    monkeypatch.setattr(onnx_files, "SMALL", 1024)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def layers(folder: Path, count: int = 4) -> Path:
    """A file of linears, each followed by relu, with its weights in w.bin."""
    steps = " ".join(f"a{n} = MatMul(h{n}, W{n}) b{n} = Add(a{n}, B{n}) h{n + 1} = Relu(b{n})" for n in range(count))
    text = f"g (float[n,{WIDTH}] h0) => (float[n,{WIDTH}] h{count}) {{ {steps} }}"
    weights = {f"W{n}": normal(WIDTH, WIDTH, seed=n) / 8 for n in range(count)}
    biases = {f"B{n}": normal(WIDTH, seed=n) for n in range(count)}
    folder.mkdir(exist_ok=True)
    proto = model(text, weights | biases)
    onnx.save(proto, folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=64)
    return folder / "m.onnx"


def mapped(path: Path) -> int:
    """Mappings of a file in this process."""
    return Path("/proc/self/maps").read_text().count(str(path))


def weight_of(graph: OnnxGraph, number: int = 0) -> Tensor:
    weight = graph.sites("linear")[number].weight
    assert weight is not None
    return weight


# --- reading -------------------------------------------------------------------------------------------------------


def test_a_mapping_lives_as_long_as_its_tensor(large: Path, tmp_path: Path, mappings: Mappings) -> None:
    path = layers(tmp_path / "m")
    graph = OnnxGraph.from_file(path)
    data = path.with_name("w.bin")
    assert mapped(data) == mappings.alive == 0
    row = weight_of(graph)[3]
    torch.testing.assert_close(row, (normal(WIDTH, WIDTH) / 8)[:, 3], rtol=0, atol=0)
    assert mapped(data) == mappings.alive == 1
    del row
    assert mapped(data) == mappings.alive == 0


@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "UINT8", "INT32", "INT64", "BOOL"])
@pytest.mark.parametrize("start", [0, 3, 4096])
def test_every_dtype_at_any_place(dtype: str, start: int, large: Path, tmp_path: Path) -> None:
    """Also where the file holds it at an odd place, which packed files do."""
    kind = getattr(TensorProto, dtype)
    array = np.arange(3000).astype(helper.tensor_dtype_to_np_dtype(kind)).reshape(50, 60)
    (tmp_path / "w.bin").write_bytes(b"\1" * start + array.tobytes())
    proto = model("g (int64[n] x) => (int64[n] y) { y = Identity(x) }")
    tensor = TensorProto(name="W", data_type=kind, dims=[50, 60], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "w.bin", "offset": start, "length": array.nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    proto.graph.initializer.append(tensor)
    proto.graph.node.append(helper.make_node("Identity", ["W"], ["Z"]))
    proto.graph.output.append(helper.make_tensor_value_info("Z", kind, [50, 60]))
    onnx.save(proto, tmp_path / "m.onnx")
    ((name, found),) = OnnxGraph.load(tmp_path / "m.onnx").constants()
    assert name == "W"
    wide = torch.from_numpy(array.astype(np.float64))
    torch.testing.assert_close(found.double(), wide, rtol=0, atol=0)
    assert found.data_ptr() % found.element_size() == 0  # torch takes any address, and not every kernel of it does


def test_small_weights_are_read_at_once(large: Path, tmp_path: Path, mappings: Mappings) -> None:
    graph = OnnxGraph.from_file(layers(tmp_path / "m"))
    read = mappings.read
    assert read == 4  # the biases, of 256 bytes
    bias = graph.sites("linear")[1].bias
    assert bias is not None
    torch.testing.assert_close(graph.constant(bias), normal(WIDTH, seed=1), rtol=0, atol=0)
    assert mappings.read == read


def test_what_was_read_stays_when_the_file_is_replaced(large: Path, tmp_path: Path) -> None:
    path = layers(tmp_path / "m")
    graph = OnnxGraph.from_file(path)
    (tmp_path / "zeros").write_bytes(bytes(path.with_name("w.bin").stat().st_size))
    (tmp_path / "zeros").replace(path.with_name("w.bin"))
    torch.testing.assert_close(weight_of(graph, 2), normal(WIDTH, WIDTH, seed=2).t() / 8, rtol=0, atol=0)


@pytest.mark.parametrize("count", [4, 12])
def test_walks_hold_one_weight_at_a_time(count: int, large: Path, tmp_path: Path, mappings: Mappings) -> None:
    graph = OnnxGraph.from_file(layers(tmp_path / "m", count))
    mappings.most = 0
    assert Cost.of(graph).bytes == count * (NBYTES + 4 * WIDTH)
    assert len(digest(graph)) == 64
    assert mappings.most <= 2 and mappings.alive == 0  # the next is mapped before the last one goes


# --- adding --------------------------------------------------------------------------------------------------------


def test_what_is_added_to_a_large_model_is_spilled(large: Path, tmp_path: Path, mappings: Mappings) -> None:
    graph = OnnxGraph.from_file(layers(tmp_path / "m"))
    added = {n: normal(100, 40, seed=n) for n in range(3)}
    values = [graph.add_constant(tensor) for tensor in added.values()]
    other = graph.add_constant(torch.arange(400, dtype=torch.int16))  # small: 800 bytes
    assert mappings.alive == 0 and onnx_files.is_spilled(graph.model)
    for value, tensor in zip(values, added.values(), strict=True):
        torch.testing.assert_close(graph.constant(value), tensor, rtol=0, atol=0)
    read = mappings.read
    torch.testing.assert_close(graph.constant(other), torch.arange(400, dtype=torch.int16), rtol=0, atol=0)
    assert mappings.read == read
    assert not list(large.iterdir())  # nameless: gone at a crash too


def test_a_clone_shares_what_was_spilled_and_outlives_the_graph(large: Path, tmp_path: Path) -> None:
    graph = OnnxGraph.from_file(layers(tmp_path / "m"))
    tensor = normal(80, WIDTH)
    site = graph.sites("linear")[-1]
    graph.replace(site, graph.emit("linear", site.input, graph.add_constant(tensor), at=site))
    clone = graph.clone()
    assert open_scratch(large) == 1
    del graph, site
    gc.collect()
    torch.testing.assert_close(weight_of(clone, -1), tensor, rtol=0, atol=0)
    del clone
    gc.collect()
    assert open_scratch(large) == 0


def open_scratch(folder: Path) -> int:
    """Files of a folder that this process holds open."""
    links = (Path(f"/proc/self/fd/{file.name}") for file in Path("/proc/self/fd").iterdir())
    return sum(str(link.readlink()).startswith(str(folder)) for link in links if link.is_symlink())


def test_a_model_that_is_not_large_spills_nothing(tmp_path: Path) -> None:
    graph = OnnxGraph.from_file(layers(tmp_path / "m"))
    graph.add_constant(normal(500, 500))
    assert graph.scratch is None and not onnx_files.is_spilled(graph.model)


def test_a_full_temporary_folder_is_named(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = OnnxGraph.from_file(layers(tmp_path / "m"))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_files, "append", full)
    with pytest.raises(OSError, match=r"no room for the weights of a large model in .*scratch; set TMPDIR"):
        graph.add_constant(normal(100, 100))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc is told to give memory back")
def test_memory_freed_between_weights_is_given_back() -> None:
    """In a process of its own: what the C library keeps depends on all that a process did before."""
    code = "from tests.dialects.onnx.test_large import freed; print(*freed())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    kept, left = map(int, run.stdout.split())
    assert kept > 150e6 and left < 30e6


def freed() -> tuple[int, int]:
    """Bytes that stay with the C library when blocks with something living above them are freed, and after a spill.

    The blocks are too small for a mapping of their own.
    """
    scratch = onnx_files.Scratch()
    before = resident()
    raised = b"x" * (31 * 2**20)  # once it is freed, glibc maps nothing smaller by itself
    del raised
    blocks, above = [], []
    for _ in range(20):
        blocks.append(b"x" * (12 * 2**20))
        above.append(b"x" * 2**18)  # too large for a hole that imports left below
    blocks.clear()
    kept = resident() - before
    scratch.store(ir.Tensor(np.zeros(2000, np.float32)))
    left = resident() - before
    del above
    return kept, left


def resident() -> int:
    """Bytes of this process in memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


# --- running and writing -------------------------------------------------------------------------------------------


def test_running_a_part_reads_only_its_weights(large: Path, tmp_path: Path, mappings: Mappings) -> None:
    graph = OnnxGraph.from_file(layers(tmp_path / "m"))
    x = normal(3, WIDTH, seed=9)
    read = mappings.read
    first = graph.sites("relu")[0].result
    (found,) = graph.evaluate({"h0": x}, [first])
    expected = torch.relu(x @ normal(WIDTH, WIDTH) / 8 + normal(WIDTH))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert mappings.read - read == 1


def test_a_graph_too_large_for_one_file_is_saved_in_two(
    large: Path, tmp_path: Path, mappings: Mappings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_files, "INSIDE", NBYTES)
    graph = OnnxGraph.from_file(layers(tmp_path / "m"))
    (tmp_path / "saved").mkdir()
    mappings.most = 0
    graph.save(tmp_path / "saved" / "graph.onnx")
    assert mappings.most == 1
    (data,) = (tmp_path / "saved").glob("*.data")
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {"graph.onnx", data.name}
    again = OnnxGraph.load(tmp_path / "saved" / "graph.onnx")
    assert again.text() == graph.text() and digest(again) == digest(graph)
    with pytest.raises(GraphError, match="do not fit one ONNX file"):
        onnx_export.write(onnx_export.deployable(graph), tmp_path / "saved" / "x.onnx", {}, external_data=False)


@pytest.mark.parametrize("dtype", [ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT])
def test_each_tensor_begins_where_the_widest_registers_read(dtype: ir.DataType) -> None:
    file = io.BytesIO()
    tensors = [ir.Tensor(np.full(count, 3, dtype.numpy()), dtype) for count in (1, 63, 64, 1501)]
    offsets = [onnx_files.append(file, tensor) for tensor in tensors]
    assert offsets == sorted(set(offsets)) and all(offset % 64 == 0 for offset in offsets)
    for offset, tensor in zip(offsets, tensors, strict=True):
        assert file.getvalue()[offset : offset + tensor.nbytes] == tensor.tobytes()


def test_four_bits_are_spilled_as_they_are_packed(large: Path) -> None:
    numbers = np.arange(-8, 7).repeat(101).astype(ir.DataType.INT4.numpy())
    stored = onnx_files.Scratch().store(ir.Tensor(numbers, ir.DataType.INT4))
    assert stored.nbytes == 758 and (stored.numpy() == numbers).all()


def test_weights_are_written_one_after_the_other(large: Path, tmp_path: Path, mappings: Mappings) -> None:
    graph = OnnxGraph.from_file(layers(tmp_path / "m"))
    model_ = onnx_export.deployable(graph)
    mappings.most = 0
    onnx_export.write(model_, tmp_path / "out.onnx", {}, external_data=True)
    assert mappings.most == 1
    stored = onnx.load(tmp_path / "out.onnx", load_external_data=False).graph.initializer
    assert sum(bool(tensor.external_data) for tensor in stored) == 4
    first = onnx.load(tmp_path / "out.onnx").graph.initializer
    found = {t.name: torch.from_numpy(np.array(onnx.numpy_helper.to_array(t))) for t in first}
    weights = [tensor for tensor in found.values() if tensor.dim() == 2]
    for number, tensor in enumerate(weights):
        torch.testing.assert_close(tensor, normal(WIDTH, WIDTH, seed=number) / 8, rtol=0, atol=0)
