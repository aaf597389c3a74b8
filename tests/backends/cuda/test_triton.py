"""The Triton kernel of target cuda; triton comes with builds of torch for CUDA, and no GPU is needed here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

INTERPRETED = """
import torch, triton
from graphopt.backends.cuda import triton_linear

torch.manual_seed(0)
rows, outputs, inputs = 17, 24, 72
x, weight = (torch.randint(-127, 128, (size, inputs), dtype=torch.int8) for size in (rows, outputs))
scale, weight_scale, bias, y = torch.rand(rows), torch.rand(outputs), torch.randn(outputs), torch.empty(rows, outputs)
triton_linear._linear.fn[(triton.cdiv(rows, 16) * triton.cdiv(outputs, 32),)](
    x, scale, weight, weight_scale, bias, y, rows, outputs, inputs, HAS_BIAS=True,
    TYPE=triton_linear._TYPES[torch.float32], ROWS=16, OUTPUTS=32, INPUTS=64,
)
wanted = (x.double() * scale[:, None].double()) @ (weight.double() * weight_scale[:, None].double()).t() + bias.double()
assert (y - wanted).abs().max() <= 1e-6 * wanted.abs().max(), (y - wanted).abs().max()
"""


def test_the_kernel_in_triton_s_interpreter() -> None:
    """In a process of its own: triton reads the variable when it is imported, which torch does early."""
    pytest.importorskip("triton", minversion="3.7", reason="an interpreter before 3.7 has no loops with numpy 2.4")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("capability", [80, 89, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_kernel_compiles_to_products_of_int8(capability: int, dtype: str, bias: bool) -> None:
    """As it is specialized where pointers and sizes are multiples of 16: loads run ahead of the products."""
    pytest.importorskip("triton.backends.nvidia")
    assembly = compiled(capability, dtype, bias)
    product = r"(mma\.sync|wgmma\.mma_async).*\.s8\.s8|tcgen05\.mma.*kind::i8"
    assert re.search(product, assembly["ptx"]), "no product of int8"
    assert "cp.async" in assembly["ptx"], "loads wait for products"
    assert assembly["cubin"]


def compiled(capability: int, dtype: str, bias: bool) -> Any:
    """By kind, what triton and ptxas make of the kernel's tile of (128, 128, 128) for an architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from graphopt.backends.cuda import triton_linear

    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    pointers = {"x": "*i8", "scale": "*fp32", "weight": "*i8", "weight_scale": "*fp32", "bias": f"*{dtype}",
                "y": f"*{dtype}"}  # fmt: skip
    sizes = dict.fromkeys(("rows", "outputs", "inputs"), "i32")
    tile = {"ROWS": 128, "OUTPUTS": 128, "INPUTS": 128}
    constants = {"HAS_BIAS": bias, "TYPE": triton_linear._TYPES[types[dtype]], **tile}
    source = ASTSource(
        fn=triton_linear._linear.fn, signature=pointers | sizes | dict.fromkeys(constants, "constexpr"),
        constexprs=constants, attrs={(index,): [["tt.divisibility", 16]] for index in range(len(pointers | sizes))},
    )  # fmt: skip
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8, "num_stages": 3})
    return made.asm
