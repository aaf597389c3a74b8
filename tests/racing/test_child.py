"""What a child says of an error: whether the engine may do better another time."""

from __future__ import annotations

import errno

import pytest

from graphopt.racing.child import Child


@pytest.mark.parametrize(
    ("error", "passing"),
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
def test_tells_a_want_of_room_from_a_fault(error: Exception, passing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: Child) -> None:
        raise error

    monkeypatch.setattr(Child, "start", start)
    assert Child().answer({"name": "start"})["passing"] == passing
