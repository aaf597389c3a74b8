"""Damaged files, in a run that is short and always the same; `make fuzz` runs on with others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.mutations import fault, folders, mutated
from tests.fuzz.sources import sources


@pytest.mark.parametrize("name", list(sources()))
def test_a_damaged_file_is_refused_in_a_line(name: str, tmp_path: Path) -> None:
    path, content = tmp_path / "damaged.onnx", sources()[name]
    path.write_bytes(content)
    assert fault(path) is None  # as it was
    for damaged in mutated(content, count=20, seed=len(name)):
        path.write_bytes(damaged)
        found = fault(path)
        assert found is None, found


def test_weights_beside_a_file_may_be_anything(tmp_path: Path) -> None:
    for path, what in folders(tmp_path, count=20, seed=3):
        assert fault(path) is None, what
