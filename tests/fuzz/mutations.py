"""Damaged copies of ONNX files, captured in children of this process that may not crash, hang or grow."""

from __future__ import annotations

import os
import random
import resource
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import onnxscript.version_converter  # noqa: F401  # children are forked from a process that has imported all

import graphopt.dialects.onnx.adapter
import graphopt.dialects.onnx.run  # noqa: F401
from graphopt.capture import capture
from graphopt.errors import GraphoptError
from tests.fuzz.sources import sources

LONGEST = 300
"""Most characters of a message of graphopt."""
SECONDS, BYTES = 30, 2**31
"""What a child may take: seconds of computing, and bytes beside those of this process."""
_WAIT = 20 * SECONDS
"""Seconds after which a child that computes nothing hangs, on a machine that others use too."""


def bytes_changed(content: bytes, random: random.Random) -> bytes:
    """A file with a few bytes changed, a part cut out, or a part repeated."""
    changed = bytearray(content)
    match random.randrange(3):
        case 0:
            for _ in range(random.randint(1, 4)):
                changed[random.randrange(len(changed))] = random.randrange(256)
        case 1:
            start = random.randrange(len(changed))
            del changed[start : start + random.randint(1, 16)]
        case _:
            start = random.randrange(len(changed))
            changed[start:start] = changed[start : start + random.randint(1, 16)]
    return bytes(changed)


def structure_changed(content: bytes, random: random.Random) -> bytes:
    """A file of which a name, an attribute, a type, a size or a node is another, or is gone."""
    model = onnx.load_from_string(content)
    for _ in range(random.randint(1, 2)):
        random.choice(_CHANGES)(model.graph, random)
    return bytes(model.SerializeToString())


def _drop_node(graph: onnx.GraphProto, random: random.Random) -> None:
    if graph.node:
        del graph.node[random.randrange(len(graph.node))]


def _repeat_node(graph: onnx.GraphProto, random: random.Random) -> None:
    if graph.node:
        graph.node.add().CopyFrom(random.choice(graph.node))


def _rename_operator(graph: onnx.GraphProto, random: random.Random) -> None:
    if graph.node:
        others = ["Add", "Reshape", "Conv", "If", "Nowhere", "", "Cast", "Loop"]
        random.choice(graph.node).op_type = random.choice(others)


def _rename_value(graph: onnx.GraphProto, random: random.Random) -> None:
    node = random.choice(graph.node) if graph.node else None
    names = None if node is None else random.choice([node.input, node.output])
    if names:
        made = [name for one in graph.node for name in one.output]
        others = [*made, *(value.name for value in graph.input), "", "other"]
        names[random.randrange(len(names))] = random.choice(others)


def _change_attribute(graph: onnx.GraphProto, random: random.Random) -> None:
    given = [attribute for node in graph.node for attribute in node.attribute]
    if not given:
        return
    one = random.choice(given)
    match random.randrange(4):
        case 0:
            one.name = "other"
        case 1:
            one.type = random.choice(list(onnx.AttributeProto.AttributeType.values()))
        case 2:
            one.i, one.f = random.choice([-1, 0, 2**40]), float("nan")
        case _:
            del one.ints[:]


def _change_size(graph: onnx.GraphProto, random: random.Random) -> None:
    values = [*graph.input, *graph.output, *graph.value_info]
    sizes = [size for value in values for size in value.type.tensor_type.shape.dim]
    if sizes:
        random.choice(sizes).dim_value = random.choice([-1, 0, 1, 7, 2**31, 2**62])


def _change_type(graph: onnx.GraphProto, random: random.Random) -> None:
    values = [*graph.input, *graph.output, *graph.value_info]
    if values:
        random.choice(values).type.tensor_type.elem_type = random.choice([0, 1, 3, 7, 8, 10, 16, 99])


def _change_weight(graph: onnx.GraphProto, random: random.Random) -> None:
    if not graph.initializer:
        return
    tensor = random.choice(graph.initializer)
    match random.randrange(4):
        case 0:
            tensor.data_type = random.choice([0, 2, 7, 8, 10, 22, 99])
        case 1:
            tensor.dims.append(random.choice([0, 2, -3]))
        case 2:
            tensor.raw_data = tensor.raw_data[:-1]
        case _:
            tensor.data_location = onnx.TensorProto.EXTERNAL


def _drop_output(graph: onnx.GraphProto, random: random.Random) -> None:
    if graph.output:
        del graph.output[random.randrange(len(graph.output))]


_CHANGES: tuple[Callable[[onnx.GraphProto, random.Random], None], ...] = (
    _drop_node, _repeat_node, _rename_operator, _rename_value, _change_attribute, _change_size, _change_type,
    _change_weight, _drop_output,
)  # fmt: skip


# --- folders -------------------------------------------------------------------------------------------------------


def folders(parent: Path, count: int, seed: int) -> Iterator[tuple[Path, str]]:
    """Files whose weights lie in one file beside them or in several, one thing of which is wrong; and what it is."""
    source = random.Random(seed)
    contents = list(sources().values())
    for number in range(count):
        folder = parent / str(number)
        folder.mkdir(parents=True)
        model, shards = onnx.load_from_string(source.choice(contents)), source.choice([1, 3])
        _store_outside(model, folder, shards)
        what = source.choice(list(_FAULTS))
        _FAULTS[what](model, folder, source)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        yield folder / "model.onnx", what


def _store_outside(model: onnx.ModelProto, folder: Path, shards: int) -> None:
    for index, tensor in enumerate(model.graph.initializer):
        content = onnx.numpy_helper.to_array(tensor).tobytes()
        name = f"weights-{index % shards}.bin"
        with (folder / name).open("ab") as file:
            offset = file.tell()
            file.write(content)
        onnx.external_data_helper.set_external_data(tensor, name, offset, len(content))
        for held in ("raw_data", "float_data", "int32_data", "int64_data"):
            tensor.ClearField(held)


def _entry(model: onnx.ModelProto, random: random.Random, key: str, value: str) -> None:
    tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
    if tensors:
        entries = random.choice(tensors).external_data
        found = next((entry for entry in entries if entry.key == key), None) or entries.add(key=key)
        found.value = value


def _data(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.bin"))


def _remove_data(model: onnx.ModelProto, folder: Path, random: random.Random) -> None:
    for path in _data(folder)[:1]:
        path.unlink()


def _cut_data(model: onnx.ModelProto, folder: Path, random: random.Random) -> None:
    for path in _data(folder)[:1]:
        path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])


def _replace_data(model: onnx.ModelProto, folder: Path, random: random.Random) -> None:
    for path in _data(folder):
        path.write_bytes(random.randbytes(path.stat().st_size))  # of another model: NaN and infinities


def _data_is_a_folder(model: onnx.ModelProto, folder: Path, random: random.Random) -> None:
    for path in _data(folder)[:1]:
        path.unlink()
        path.mkdir()


def _set_entry(key: str, *values: str) -> Callable[[onnx.ModelProto, Path, random.Random], None]:
    return lambda model, folder, random: _entry(model, random, key, random.choice(values))


_FAULTS: dict[str, Callable[[onnx.ModelProto, Path, random.Random], None]] = {
    "nothing": lambda model, folder, random: None, "no data file": _remove_data, "data cut off": _cut_data,
    "data of another model": _replace_data, "data is a folder": _data_is_a_folder,
    "offset": _set_entry("offset", "-1", "1", "99999999", "one", "", "1e3", str(2**70)),
    "length": _set_entry("length", "-1", "0", "3", "99999999", "many", str(2**70)),
    "location": _set_entry("location", "", ".", "..", "/etc/passwd", "../../x.bin", "weights-9.bin", "a\x00b",
                           "w" * 999),
    "another key": _set_entry("checksum", "0", "x" * 999),
    "shape": lambda model, folder, random: _change_shape(model, random),
}  # fmt: skip


def _change_shape(model: onnx.ModelProto, random: random.Random) -> None:
    tensors = [tensor for tensor in model.graph.initializer if tensor.dims]
    if tensors:
        dims = random.choice(tensors).dims
        dims[random.randrange(len(dims))] = random.choice([-1, 0, 1, 2**20, 2**40])


# --- files ---------------------------------------------------------------------------------------------------------


def mutated(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Damaged copies of a file, half of them by bytes and half by structure."""
    source = random.Random(seed)
    for number in range(count):
        yield (bytes_changed if number % 2 else structure_changed)(content, source)


def fault(path: Path) -> str | None:
    """Capture a file in a child: what is wrong with how that ends, or None.

    Right are a captured graph, and a GraphoptError of one short line; nothing may be printed.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        for stream in (1, 2):
            os.dup2(write, stream)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        os._exit(_captured(path))
    os.close(write)
    return _judged(child, read)


def _captured(path: Path) -> int:
    try:
        capture(str(path), "onnx")
    except GraphoptError as error:
        message = str(error).replace(str(path.parent), "")
        if len(message) > LONGEST or "\n" in message or "onnxruntime::" in message or "In clone_graph" in message:
            print(f"unclear message: {error}", flush=True)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    return 0


def _judged(child: int, read: int) -> str | None:
    """How a child ended whose output comes through a pipe."""
    printed, deadline, hangs = b"", time.monotonic() + _WAIT, False
    while not hangs:
        ready, _, _ = select.select([read], [], [], max(deadline - time.monotonic(), 0))
        hangs = not ready
        chunk = os.read(read, 2**16) if ready else b""
        if not chunk:
            break
        printed += chunk
    if hangs:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(read)
    if hangs or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return f"it takes more than {SECONDS} seconds"
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}: {printed[-200:]!r}"
    return printed.decode(errors="replace")[-2000:] or None
