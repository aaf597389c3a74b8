"""What a child says of an error, whether the engine may do better another time, and when it answers."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from unittest.mock import Mock

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


def test_it_answers_once_its_threads_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that threads which still spin slow no other process of the race."""
    log: list[str] = []
    one = Child()
    one.backend, one.feeds = Mock(place=lambda feeds: feeds, clock=time.perf_counter), [{}]
    one.runner = Mock(side_effect=lambda feeds: log.append("run"))
    monkeypatch.setattr("graphopt.racing.child.rest", lambda most: log.append("rest"))
    assert one.time(0, calls=2) > 0
    assert log == ["run", "run", "rest"]
