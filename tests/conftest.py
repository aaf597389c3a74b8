"""Fixtures that tests of several folders share."""

import os

import pytest
import torch

torch.set_num_threads(1)  # several test processes share the cores
os.environ["GRAPHOPT_MEASURE"] = "0"  # a test that measures brings its own clock


@pytest.fixture(params=["fx", "onnx"])
def dialect(request: pytest.FixtureRequest) -> str:
    """Each test that takes it runs once on either dialect."""
    return str(request.param)
