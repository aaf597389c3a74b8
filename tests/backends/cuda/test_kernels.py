"""The operators of target cuda: numbers against float64 on the CPU, shapes and the kernels' rules with fake tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.backends.cuda.kernels import SPARSE, compress, decompress, is_sparse

OPS = torch.ops.graphopt_cuda
EIGHT = (torch.int8, torch.float8_e4m3fn)


def steps(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    return (torch.randn(shape, generator=generator) * 20).to(dtype)


def scales(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def sparse(weight: Tensor) -> Tensor:
    """Two of four neighbours kept, which ones differing along the row."""
    places = torch.tensor(list(itertools.combinations(range(4), 2)))
    kept = torch.zeros(len(places), 4, dtype=torch.bool).scatter_(1, places, True)
    mask = kept[torch.arange(weight.numel() // 4) % len(places)].reshape(weight.shape)
    return torch.where(mask, weight.float(), 0.0).to(weight.dtype)


def exact(x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    y = (x.double() * scale.double()) @ (weight.double() * weight_scale.double()[:, None]).t()
    return y if bias is None else y + bias.double()


def linear(dtype: torch.dtype) -> Any:
    return OPS.linear_int8 if dtype == torch.int8 else OPS.linear_float8


@pytest.mark.parametrize("dtype", EIGHT)
@pytest.mark.parametrize("lead", [(1,), (2, 8), (17,), (3, 5, 4)])
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_of_8_bits_against_float64(
    dtype: torch.dtype, lead: tuple[int, ...], by_row: bool, bias: bool
) -> None:
    x, weight = steps(*lead, 48, dtype=dtype), steps(32, 48, dtype=dtype, seed=2)
    scale = scales(*lead, 1) if by_row else scales()
    weight_scale, offset = scales(32, seed=3), torch.linspace(-9, 9, 32) if bias else None
    found = linear(dtype)(x, scale, weight, weight_scale, offset, dtype=torch.float32)
    wanted = exact(x, scale, weight, weight_scale, offset)
    assert found.shape == wanted.shape and found.dtype == torch.float32 and found.is_contiguous()
    # float8 leaves its kernel in bfloat16: 8 bits of fraction, the hidden one included
    step = 2**-8 if dtype != torch.int8 else 1e-6
    assert (found - wanted).abs().max() <= step * wanted.abs().max()
    if dtype == torch.int8:
        fused = OPS.linear_int8_fused(x, scale, weight, weight_scale, offset, dtype=torch.float32)
        assert torch.equal(fused, found)


@pytest.mark.parametrize("dtype", EIGHT)
def test_a_weight_that_was_filled_up_gives_what_it_gave(dtype: torch.dtype) -> None:
    x, weight = steps(5, 41, dtype=dtype), steps(30, 41, dtype=dtype, seed=2)
    scale, weight_scale = scales(5, 1), scales(30)
    filled = weight.new_zeros((32, 48))
    filled[:30, :41] = weight
    found = linear(dtype)(x, scale, filled, weight_scale, torch.ones(30), dtype=torch.float32)
    wanted = exact(x, scale, weight, weight_scale, torch.ones(30))
    assert found.shape == (5, 30) and (found - wanted).abs().max() <= 2**-8 * wanted.abs().max()


def test_a_weight_of_integers_alone_against_float64() -> None:
    weight, weight_scale, bias = steps(24, 40, dtype=torch.int8), scales(24), torch.linspace(-1, 1, 24)
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(4))
    found = OPS.linear_weight_int8(x, weight, weight_scale, bias)
    wanted = exact(x, torch.ones(()), weight, weight_scale, bias)
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    short = OPS.linear_weight_int8(x.bfloat16(), weight, weight_scale, bias.bfloat16())
    assert short.dtype == torch.bfloat16 and (short - wanted).abs().max() <= 0.02 * wanted.abs().max()


# --- 2:4 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SPARSE)
def test_2_4_is_compressed_bit_by_bit(dtype: torch.dtype) -> None:
    weight = sparse(steps(64, 256, dtype=dtype) if dtype in EIGHT else torch.randn(64, 256).to(dtype))
    weight[:2] = 0
    packed, meta = compress(weight)
    assert packed.shape == (64, 128) and packed.dtype == dtype
    back = decompress(packed, meta)
    as_integers = torch.int8 if dtype.itemsize == 1 else torch.int16
    assert torch.equal(back.view(as_integers), torch.where(weight.float() == 0, 0, weight.view(as_integers)))
    assert is_sparse(weight) and not is_sparse(torch.ones(4, 8)) and not is_sparse(torch.ones(4, 6))


@pytest.mark.parametrize("dtype", SPARSE)
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_a_product_with_2_4_against_float64(dtype: torch.dtype, rows: int) -> None:
    eight = dtype in EIGHT
    weight = sparse(steps(32, 128, dtype=dtype) if eight else torch.randn(32, 128).to(dtype))
    x = steps(rows, 128, dtype=dtype, seed=5) if eight else torch.randn(rows, 128).to(dtype)
    packed, meta = compress(weight)
    if eight:
        scale, weight_scale = scales(rows, 1), scales(32)
        sizes = {"outputs": 32, "dtype": torch.float32}
        found = OPS.linear_int8_sparse(x, scale, packed, meta, weight_scale, None, **sizes)
        wanted = exact(x, scale, weight, weight_scale, None)
    else:
        found = OPS.linear_sparse(x, packed, meta, torch.ones(32, dtype=dtype), outputs=32)
        wanted = exact(x, torch.ones(()), weight, torch.ones(32), torch.ones(32))
    step = 1e-6 if dtype == torch.int8 else 2**-7
    assert found.shape == (rows, 32) and (found - wanted).abs().max() <= step * wanted.abs().max()


# --- the rules of the kernels, without a GPU -----------------------------------------------------------------------


class Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Holds what reaches a kernel to the rules that its meta kernel does not check."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name == "_int_mm":
            a, b = args
            assert a.dtype == b.dtype == torch.int8 and result.dtype == torch.int32
            assert a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
            assert a.is_contiguous() and b.t().is_contiguous()
        elif name == "_scaled_mm":
            a, b, scale_a, scale_b = args[:4]
            assert a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0 and a.is_contiguous() and b.t().is_contiguous()
            assert scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1])
            assert scale_a.is_contiguous() and scale_b.is_contiguous()
            assert scale_a.dtype == scale_b.dtype == torch.float32
            assert result.dtype == torch.bfloat16  # of row by row scaling, all that CUTLASS gives
        elif name == "product_sparse":
            packed, _, x = args
            assert x.shape[0] % 16 == 0 and x.is_contiguous() and x.dtype == packed.dtype
            assert 2 * packed.shape[1] == x.shape[1] and result.shape == (packed.shape[0], x.shape[0])
        if name in ("_int_mm", "_scaled_mm", "product_sparse", "linear_int8_fused"):
            self.seen.append(name)
            assert result.device.type == "cuda"
        return result


@pytest.fixture
def gpu() -> Iterator[Any]:
    """Makes fake tensors on a GPU of real ones."""
    with FakeTensorMode() as mode:
        cuda = torch.device("cuda")
        yield lambda tensor: torch.ops.aten._to_copy.default(mode.from_tensor(tensor), device=cuda)


@pytest.mark.parametrize("lead", [(1,), (2, 16), (4, 8, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_reaches_the_kernels_keeps_their_rules(gpu: Any, lead: tuple[int, ...], dtype: torch.dtype) -> None:
    with Kernels() as kernels:
        for eight in EIGHT:
            for inputs, by_row in ((128, True), (121, False)):
                x = torch.empty(*lead, inputs, dtype=eight, device="cuda")
                scale = torch.empty((*lead, 1) if by_row else (), device="cuda")
                weight = torch.empty(64, 128, dtype=eight, device="cuda")
                weight_scale, bias = torch.empty(60, device="cuda"), torch.empty(60, device="cuda", dtype=dtype)
                several = [linear(eight)] + ([OPS.linear_int8_fused] if eight == torch.int8 else [])
                for kernel in several:
                    y = kernel(x, scale, weight, weight_scale, bias, dtype=dtype)
                    assert (y.shape, y.dtype, y.device.type) == ((*lead, 60), dtype, "cuda") and y.is_contiguous()
            x, scale = torch.empty(*lead, 128, dtype=eight, device="cuda"), torch.empty(*lead, 1, device="cuda")
            packed = x.new_empty(64, 64), torch.empty(64, 4, dtype=torch.int32, device="cuda")
            sizes = {"outputs": 64, "dtype": dtype}
            y = OPS.linear_int8_sparse(x, scale, *packed, torch.empty(64, device="cuda"), None, **sizes)
            assert (y.shape, y.dtype) == ((*lead, 64), dtype) and y.is_contiguous()
        narrow = torch.empty(*lead, 128, dtype=torch.float16, device="cuda")
        packed = narrow.new_empty(64, 64), torch.empty(64, 8, dtype=torch.int16, device="cuda")
        y = OPS.linear_sparse(narrow, *packed, None, outputs=64)
        assert (y.shape, y.dtype) == ((*lead, 64), torch.float16) and y.is_contiguous()
        whole = torch.empty(64, 128, dtype=torch.int8, device="cuda")
        y = OPS.linear_weight_int8(narrow, whole, torch.empty(64, device="cuda"), narrow.new_empty(64))
        assert (y.shape, y.dtype) == ((*lead, 64), torch.float16)
    assert set(kernels.seen) == {"_int_mm", "_scaled_mm", "product_sparse", "linear_int8_fused"}


def test_torch_itself_takes_a_compressed_weight_so(gpu: Any) -> None:
    """What CUTLASS is called with on compute capability 8.x."""
    for dtype, wide in ((torch.bfloat16, None), (torch.int8, torch.int32)):
        with unset_fake_temporarily():
            both = compress(sparse(torch.ones(64, 128).to(dtype)))
        packed, meta = map(gpu, both)
        x = torch.empty(32, 128, dtype=dtype, device="cuda")
        y = torch._sparse_semi_structured_mm(packed, meta, x.t(), out_dtype=wide)
        assert (y.shape, y.dtype) == ((64, 32), wide or dtype)


def test_a_compiler_sees_through_all_but_two() -> None:
    """So that it fuses rounding in front of, and scales behind, the product."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x, weight, scale = steps(4, 16, dtype=torch.int8), steps(8, 16, dtype=torch.int8), scales(8)
    traced = make_fx(lambda *given: OPS.linear_int8(*given, None, dtype=torch.float32))(x, scales(4, 1), weight, scale)
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
    assert "aten._int_mm.default" in called and not any("graphopt" in name for name in called)
    packed, meta = compress(sparse(torch.ones(32, 64).bfloat16()))
    x = torch.ones(4, 64).bfloat16()
    traced = make_fx(lambda *given: OPS.linear_sparse(*given, None, outputs=32))(x, packed, meta)
    own = [str(node.target) for node in traced.graph.nodes if "graphopt" in str(node.target)]
    assert own == ["graphopt_cuda.product_sparse.default"]


def test_sums_of_integers_stay_in_the_range_of_float16() -> None:
    weight, x = torch.full((2, 4096), 127, dtype=torch.int8), torch.ones(1, 4096, dtype=torch.float16)
    y = OPS.linear_weight_int8(x, weight, torch.full((2,), 0.02 / 127), None)
    assert y.dtype is torch.float16
    torch.testing.assert_close(y.double(), torch.full((1, 2), 81.92, dtype=torch.float64), rtol=2e-3, atol=0)
