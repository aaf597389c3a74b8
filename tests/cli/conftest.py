"""What the tests of several commands start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.cli.test_cli import RANDOM, write_model
from tests.serving.conftest import encoder, model_file  # noqa: F401  (the bundle that is served)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny.onnx")


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    np.savez(tmp_path / "calibration.npz", x=RANDOM.normal(size=(20, 16)).astype(np.float32))
    return tmp_path / "calibration.npz"
