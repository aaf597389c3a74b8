"""Target cuda without a GPU: what is lowered to what, its numbers on the CPU, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import graphopt
from graphopt.backends.cuda import kernels as cuda_kernels
from graphopt.backends.cuda import rules, runner
from graphopt.backends.cuda.device import Device
from graphopt.backends.cuda.runner import OPTIONS, CudaRunner, on_device
from graphopt.backends.cuda.target import Cuda
from graphopt.capture.tracing import on_cpu
from graphopt.dialects.fx.graph import FxGraph
from graphopt.errors import LoweringError, PassError, UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph
from graphopt.ir.rewrite import rewrite
from graphopt.lowering.timed_forms import MIN_SQNR
from graphopt.numerics.metrics import sqnr
from graphopt.passes import Quantize, Sparsify
from tests.language import BITS, build, declined, outputs, run

A100, T4 = Device("NVIDIA A100", (8, 0), 40 * 10**9), Device("Tesla T4", (7, 5), 16 * 10**9)
BATCHES = [{"x": torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(seed))} for seed in range(2)]
AXES = {"x": {0: "batch", 1: "length"}}


class Block(nn.Module):
    """Attention and a feed-forward layer over x (batch, length, 128)."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(128, 128) for _ in range(4))
        self.up, self.down, self.norm = nn.Linear(128, 256), nn.Linear(256, 128), nn.LayerNorm(128)

    def forward(self, x: Tensor) -> Tensor:
        heads = [f(x).view(*x.shape[:2], 4, 32).transpose(1, 2) for f in (self.query, self.key, self.value)]
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(x.shape)
        x = self.norm(x + self.out(y))
        return x + self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


def optimized(module: nn.Module, passes: str, **options: Any) -> Any:
    return graphopt.optimize(
        module, passes, target="cuda", example_inputs=BATCHES[0]["x"], dynamic_shapes=AXES, calibration=BATCHES,
        measure=False, **options,
    )  # fmt: skip


def kernels(small: Any) -> dict[str, int]:
    built = small.report.kernels
    own = {kind.split(".")[1]: count for kind, count in built.items() if kind.startswith("graphopt_cuda")}
    return own or {"linear": built["linear"]}


@pytest.mark.parametrize(
    ("passes", "expected", "least"),
    [
        ("", {"linear": 4}, 120),
        pytest.param("cast{dtype=bfloat16}", {"linear": 4}, 40, marks=pytest.mark.slow),
        ("quantize{scheme=dynamic}", {"linear_int8": 4}, 40),
        ("quantize{scheme=static}", {"linear_int8": 4}, 36),
        ("quantize{scheme=weight-only}", {"linear_weight_int8": 4}, 46),
        ("quantize{scheme=dynamic,dtype=float8}", {"linear_float8": 4}, 32),
        pytest.param("quantize{scheme=static,dtype=float8}", {"linear_float8": 4}, 30, marks=pytest.mark.slow),
        ("sparsify{pattern=2:4},cast{dtype=float16}", {"linear_sparse": 4}, 10),
        ("sparsify{pattern=2:4},quantize{scheme=dynamic}", {"linear_int8_sparse": 4}, 10),
        pytest.param(
            "sparsify{pattern=2:4},quantize{scheme=dynamic,dtype=float8}", {"linear_int8_sparse": 4}, 10,
            marks=pytest.mark.slow,
        ),
        pytest.param("quantize{scheme=dynamic},cast{dtype=bfloat16}", {"linear_int8": 6}, 38, marks=pytest.mark.slow),
        ("quantize{scheme=dynamic,dtype=float8},cast{dtype=bfloat16}", {"linear_float8": 6}, 32),
    ],
)
def test_a_block_end_to_end(block: Block, passes: str, expected: dict[str, int], least: float, tmp_path: Path) -> None:
    """Lowered, held to the ops, run on the CPU at other shapes, written, and read by torch alone."""
    small = optimized(block, passes)
    assert kernels(small) == expected and small.report.agreement[0].sqnr > least
    x = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        assert small(x).dtype == torch.float32 and sqnr(block(x), small(x)) > least - 8
    small.export(tmp_path / "small.pt2")
    assert torch.equal(torch.export.load(tmp_path / "small.pt2").module()(x), small(x))
    again = CudaRunner(FxGraph.load(tmp_path / "small.pt2"), None)
    assert torch.equal(again({"x": x})[0], small(x))


def test_activations_are_rounded_by_row_about_zero(block: Block) -> None:
    small = optimized(block, "quantize{scheme=dynamic}")
    ops = small.report.ops_after
    assert ops["row_scale"] == ops["quantize"] == 4 and "choose_qparams" not in ops
    for site in small.folded.sites("quantize"):
        scale = site.required("scale")
        assert site.result.dtype == torch.int8 and scale.shape == (*site.input.shape[:-1], 1)


@pytest.mark.parametrize("scheme", ["static", "dynamic", "weight-only"])
def test_weights_are_the_integers_of_the_cpu_target(scheme: str) -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    found, calibration = [], [{"input": torch.randn(9, 128)}]
    bits = 8 if scheme == "weight-only" else BITS
    for target in ("cuda", "onnxruntime"):
        small = graphopt.optimize(
            module, f"quantize{{scheme={scheme},rounding=nearest,bits={bits}}}", target=target,
            calibration=calibration, example_inputs=torch.randn(3, 128), measure=False,
        )  # fmt: skip
        graph: Graph = small.folded
        stored = [site.required("x") for site in graph.sites("dequantize") if site.required("x").is_constant]
        stored += [site.required("weight") for site in graph.sites("linear_int8")]
        tensors = [graph.constant(one) for one in stored]
        found.append([one if one.shape[0] < one.shape[1] else one.t() for one in tensors if one is not None])
    assert len(found[0]) == 2 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- forms ---------------------------------------------------------------------------------------------------------


TEXTS = {
    "8-bit-linear": "y = linear(x[3,5,128], W[64,128], B[64])",
    "8-bit-linear-2:4": "y = linear(x[3,5,128], W[64,128], B[64])",
    "linear-2:4": "y = linear(x[3,5,128], W[64,128], B[64])",
}


@pytest.mark.parametrize("dtype", ["int8", "float8"])
@pytest.mark.parametrize("zeros", [True, False])
def test_the_forms_of_a_product_are_alike(dtype: Any, zeros: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "has_triton", lambda: True)
    graph = build("fx", TEXTS["8-bit-linear"])
    if zeros:
        run(Sparsify(pattern="2:4"), graph)
    run(Quantize(scheme="dynamic", dtype=dtype), graph, target=Cuda())
    expected = outputs(graph)
    choice = rules.PRODUCT_24 if zeros else rules.PRODUCT
    assert len(choice.matches(graph)) == 1
    assert [node.kind for node in choice.around(choice.matches(graph)[0])] == [
        "row_scale", "quantize", "dequantize", "dequantize", "linear"
    ]  # fmt: skip
    for form in choice.forms:
        made = graph.clone()
        log = rewrite(made, [choice.only(form)])[choice.name]
        if form == "triton" and dtype == "float8":
            assert list(log.declined.values()) == [Decline("triton_is_for_int8")]
            continue
        assert log.hits == 1 and sqnr(expected[0], outputs(made)[0]) > MIN_SQNR


def test_without_triton_its_form_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "has_triton", lambda: False)
    graph = build("fx", TEXTS["8-bit-linear"])
    run(Quantize(scheme="dynamic"), graph, target=Cuda())
    log = rewrite(graph, [rules.PRODUCT.only("triton")])["8-bit-linear"]
    assert list(log.declined.values()) == [Decline("triton_missing")]


def test_2_4_of_other_sizes_stays_dense_and_says_so(block: Block) -> None:
    graph = build("fx", "y = linear(x[3,64], W[24,64])")
    run(Sparsify(pattern="2:4"), graph)
    site = graph.sites("linear")[0]
    narrow = graph.add_constant(site.weight.half())  # type: ignore[union-attr]
    x = graph.emit("cast", site.input, dtype=torch.float16, at=site)
    graph.replace(site, graph.emit("linear", x, narrow, at=site))
    _, logs = Cuda().lower(graph)
    assert list(logs["linear-2:4"].declined.values()) == [
        Decline("not_a_multiple_for_2_4", outputs=32, inputs=64, shape=[24, 64])
    ]


def test_sizes_are_filled_up_where_that_is_little_and_stay_float_where_it_is_much() -> None:
    graph = build("fx", "y = linear(x[3,100], W[62,100])\nz = linear(u[3,100], V[3,100])\nreturn y, z")
    context = run(Quantize(scheme="dynamic"), graph, target=Cuda())
    assert declined(context) == ["too_much_padding"]
    lowered, _ = Cuda().lower(graph)
    (site,) = [node for node in lowered.nodes if node.kind == "graphopt_cuda.linear_int8.default"]
    assert site.operands[2].shape == (64, 104) and site.result.shape == (3, 62)  # type: ignore[union-attr]
    torch.testing.assert_close(outputs(lowered)[0], outputs(graph)[0], rtol=1e-5, atol=1e-5)


def test_activations_with_a_zero_point_have_no_kernel() -> None:
    graph = build("fx", TEXTS["8-bit-linear"])
    run(Quantize(scheme="dynamic"), graph)  # as targets on the CPU want them
    reason = rules.why_no_kernel(graph.sites("linear")[0])
    assert reason == Decline("activation_not_symmetric", dtype="torch.uint8", kernel="torch.int8")
    Cuda().check(graph, CudaRunner(Cuda().lower(graph)[0], None))  # type: ignore[arg-type]


def test_fewer_kernels_than_promised_are_an_error() -> None:
    graph = build("fx", TEXTS["8-bit-linear"])
    run(Quantize(scheme="dynamic"), graph, target=Cuda())
    assert isinstance(graph, FxGraph)
    with pytest.raises(LoweringError, match=r"1 linears in 8 bits were promised and the program has 0 operators"):
        Cuda().check(graph, CudaRunner(graph, None))


# --- the GPU that is not there -------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_and_what_to_do(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAPHOPT_MEASURE")
    monkeypatch.setattr(Device, "here", classmethod(lambda cls: None))
    for measure in (None, True):
        with pytest.raises(UsageError, match=r"runs on an NVIDIA GPU, and torch .* give measure=False to lower"):
            graphopt.optimize(block, target="cuda", example_inputs=BATCHES[0]["x"], measure=measure)
    small = optimized(block, "")
    assert "lowered for an NVIDIA GPU and not run on one" in " ".join(small.report.notes)
    with pytest.raises(UsageError, match="give measure=False"):
        small.bench()
    with pytest.raises(UsageError, match="leave out cpu=avx2"):
        graphopt.optimize(block, target="cuda", example_inputs=BATCHES[0]["x"], cpu="avx2")


def test_a_gpu_too_old_is_named() -> None:
    graph = build("fx", TEXTS["8-bit-linear"])
    with pytest.raises(UsageError, match=r"float8 needs .* 8\.9, and this is NVIDIA A100 \(compute capability 8\.0\)"):
        run(Quantize(scheme="dynamic", dtype="float8"), graph, target=Cuda(device=A100))
    run(Quantize(scheme="dynamic"), graph.clone(), target=Cuda(device=A100))
    notes = run(Sparsify(pattern="2:4"), graph, target=Cuda(device=T4)).record.notes
    assert "2:4 zeros make nothing faster on cuda" in notes[1] and "this is Tesla T4" in notes[1]
    graph = build("fx", TEXTS["linear-2:4"])
    notes = run(Sparsify(pattern="2:4"), graph, target=Cuda()).record.notes
    assert "kernels skip zeros in 2:4" in notes[1]
    run(Quantize(scheme="dynamic"), graph, target=Cuda(device=A100))
    for device, kernel in ((A100, "linear_int8_sparse"), (T4, "linear_int8")):
        lowered, _ = Cuda(device=device).lower(graph)
        assert [node.kind for node in lowered.nodes][-1] == f"graphopt_cuda.{kernel}.default"


def test_float8_of_weights_alone_and_on_other_targets_is_refused() -> None:
    graph = build("fx", TEXTS["8-bit-linear"])
    context = run(Quantize(scheme="weight-only", dtype="float8"), graph, target=Cuda())
    assert declined(context) == ["dtype_weight_only"]
    with pytest.raises((UsageError, PassError), match="has no kernels in float8; there is int8"):
        run(Quantize(dtype="float8"), graph)


def test_weights_that_do_not_fit_are_refused_before_they_are_moved() -> None:
    graph = build("fx", TEXTS["8-bit-linear"])
    with pytest.raises(LoweringError, match=r"out of memory: weights of 3\.3e-05 GB do not fit the 1e-06 GB .* Toy"):
        Cuda(device=Device("Toy", (9, 0), 1000)).compile(graph)


def test_memory_that_runs_out_is_named_and_the_model_stays() -> None:
    graph = build("fx", TEXTS["8-bit-linear"])
    assert isinstance(graph, FxGraph)
    on_cpu = CudaRunner(graph, None)
    on_cpu._device = A100
    refused = pytest.raises(LoweringError, match=r"out of memory on NVIDIA A100 .* at inputs of \[\[1\]\]: .*")
    with refused, on_cpu._memory("at inputs of [[1]]"):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("passes", ["quantize{scheme=dynamic},cast{dtype=bfloat16}", "sparsify{pattern=2:4},cast"])
def test_a_program_is_moved_whole(block: Block, passes: str) -> None:
    """With fake tensors: every weight and result is on the GPU, and 2:4 is packed again where CUTLASS has no kernel."""
    lowered = optimized(block, passes).lowered
    packs: list[torch.dtype] = []

    def pack(dtype: torch.dtype) -> Any:
        packs.append(dtype)
        return lambda packed, meta: packed.new_empty(packed.numel() * 9 // 8)

    with FakeTensorMode(allow_non_fake_inputs=True):
        module = on_device(lowered, "cuda", pack)
        assert {thing.device.type for thing in module.state_dict().values()} <= {"cuda"}
        (y,) = module(torch.empty(2, 3, 128, device="cuda"))
    assert y.shape == (2, 3, 128) and y.device.type == "cuda" and y.dtype == torch.float32
    assert len(packs) == (4 if "2:4" in passes else 0)
    assert runner._pack_for(A100)(torch.bfloat16) is None
    assert runner._pack_for(A100)(torch.float8_e4m3fn) is cuda_kernels.pack_cusparselt
    assert runner._pack_for(Device("H100", (9, 0), 0))(torch.int8) is cuda_kernels.pack_cusparselt


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_program_is_one_graph_to_a_compiler(block: Block, dynamic: bool) -> None:
    """Traced as for Inductor, and run by aten: without a break, at the shapes of the call or any."""
    for passes in ("quantize{scheme=dynamic},cast{dtype=bfloat16}", "sparsify{pattern=2:4},quantize{scheme=static}"):
        small = optimized(block, passes)
        module = on_device(small.lowered, "cpu", pack=lambda dtype: None)
        run = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            found = run(x)[0]
        assert sqnr(small(x), found) > 40  # the last bit of a float may turn a rounding


def test_inductor_knows_the_options() -> None:
    assert set(OPTIONS) <= set(torch._inductor.list_options())


def test_a_program_on_the_cpu_stays_as_it_is() -> None:
    """One elsewhere is copied, which takes a device: even a fake one ends the process in builds of torch without it."""
    plain = torch.export.export(nn.Linear(4, 3), (torch.empty(2, 4),))
    assert on_cpu(plain) == (plain, [])


def test_statistics_give_static_scales_of_either_type() -> None:
    cases: list[tuple[Any, float]] = [("int8", 127.0), ("float8", 448.0)]
    for dtype, largest in cases:
        graph = build("fx", TEXTS["8-bit-linear"])
        batch = torch.linspace(-2, 3, 3 * 5 * 128).reshape(3, 5, 128)
        run(Quantize(scheme="static", dtype=dtype, observer="minmax"), graph, target=Cuda(), calibration=[{"x": batch}])
        (site,) = graph.sites("quantize")
        scale = graph.constant(site.required("scale"))
        assert scale is not None and scale.item() == pytest.approx(3 / largest)


def test_context_tells_nothing_of_saturation() -> None:
    """Which is a matter of CPUs."""
    graph = build("fx", TEXTS["8-bit-linear"])
    context = run(Quantize(scheme="dynamic", dtype="float8"), graph, target=Cuda())
    assert not any("VNNI" in note for note in context.record.notes)
