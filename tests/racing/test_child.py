"""What a child says of an error: whether the engine may do better another time."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from graphopt.racing.child import Child, write


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (RuntimeError("std::bad_alloc"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), True),
        (RuntimeError("no kernel for this operator"), False),
        (ValueError("a shape differs"), False),
    ],
)
def test_tells_a_want_of_room_from_a_fault(error: Exception, transient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: Child) -> None:
        raise error

    monkeypatch.setattr(Child, "start", start)
    assert Child().answer({"name": "start"})["transient"] == transient


def test_a_file_that_cannot_be_written_is_an_error_of_the_disk(tmp_path: Path) -> None:
    tensors = [torch.arange(5), None]
    write(tensors, tmp_path / "tensors.pt")
    torch.testing.assert_close(torch.load(tmp_path / "tensors.pt", weights_only=True)[0], tensors[0])
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tensors, tmp_path / "full.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(OSError, match="No such file"):
        write(tensors, tmp_path / "nowhere" / "tensors.pt")
