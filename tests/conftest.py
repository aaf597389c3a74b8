"""Fixtures that tests of several folders share."""

import pytest


@pytest.fixture(params=["fx", "onnx"])
def dialect(request: pytest.FixtureRequest) -> str:
    """Each test that takes it runs once on either dialect."""
    return str(request.param)
