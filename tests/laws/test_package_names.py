"""The names of the package are what they say, whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

import pytest

ORDERS = {
    "submodule first": "import graphopt.api, graphopt.comparing, graphopt.sensitivities; import graphopt",
    "submodule last": "import graphopt; graphopt.optimize; from graphopt.api import Optimized",
    "by an instrument": "from graphopt.pipeline.instruments import Dump; import graphopt",
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_functions_named_like_their_modules_are_functions(order: str) -> None:
    check = "print(*(type(getattr(graphopt, name)).__name__ for name in ('optimize', 'compare', 'sensitivity')))"
    found = subprocess.run([sys.executable, "-c", f"{order}; {check}"], capture_output=True, text=True, check=True)
    assert found.stdout == "function function function\n"


def test_importing_the_package_imports_no_torch() -> None:
    check = "import sys, graphopt; print('torch' in sys.modules, 'onnx' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout == "False False\n"
