"""Fixtures that tests of several folders share."""

import os
import signal

import pytest
import torch

torch.set_num_threads(1)  # several test processes share the cores
os.environ["GRAPHOPT_MEASURE"] = "0"  # a test that measures brings its own clock


@pytest.fixture(autouse=True, scope="session")
def interrupts() -> None:
    """Let Ctrl-C reach the tests that send it to themselves: what a shell starts in the background ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["fx", "onnx"])
def dialect(request: pytest.FixtureRequest) -> str:
    """Each test that takes it runs once on either dialect."""
    return str(request.param)
