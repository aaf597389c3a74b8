"""Convs, pools, resizing and recurrence compute in torch what ONNX Runtime computes."""

from __future__ import annotations

import pytest
import torch

from tests.operators import assert_equal, built, feeds, normal


def test_convs_and_pools() -> None:
    body = "\n".join(
        f'conv{index} = Conv<auto_pad = "{how}", strides = [2,{stride}]>(x, w, b)\n'
        f'max{index} = MaxPool<auto_pad = "{how}", kernel_shape = [3,2], strides = [2,{stride}]>(x)\n'
        f'mean{index} = AveragePool<auto_pad = "{how}", kernel_shape = [3,2], strides = [2,{stride}]>(x)'
        for index, (how, stride) in enumerate([("SAME_UPPER", 1), ("SAME_LOWER", 2), ("VALID", 1)])
    ) + """
        uneven = Conv<pads = [1,0,0,1]>(x, w, b)
        grouped = Conv<group = 3>(x, g)
        even = Conv<pads = [1,1,1,1], dilations = [2,1]>(x, w)
        pool = MaxPool<kernel_shape = [3,3], pads = [1,0,0,1], ceil_mode = 1, strides = [2,2]>(x)
        wide = MaxPool<kernel_shape = [2,2], dilations = [2,2], pads = [1,1,1,1]>(x)
        average = AveragePool<kernel_shape = [3,3], pads = [1,0,0,1], count_include_pad = 1>(x)
        average2 = AveragePool<kernel_shape = [3,3], pads = [1,1,1,1]>(x)
        lp = LpPool<kernel_shape = [2,2], p = 2>(x)
        most = GlobalMaxPool(x)
        all = GlobalAveragePool(x)
        norm = GlobalLpPool(x)
        back = ConvTranspose(x, t)
        back2 = ConvTranspose<strides = [2,2], pads = [1,1,1,1], output_padding = [1,1]>(x, t, b)
        back3 = ConvTranspose<strides = [2,3], pads = [0,1,1,0], dilations = [1,2]>(x, t)
        back4 = ConvTranspose<strides = [2,2], auto_pad = "SAME_UPPER">(x, t)
        back5 = ConvTranspose<strides = [2,2], output_shape = [13,15]>(x, t)
        back6 = ConvTranspose<group = 3>(x, t)
        """
    tensors = {"w": normal(4, 3, 3, 2), "b": normal(4), "g": normal(6, 1, 2, 2), "t": normal(3, 4, 3, 3)}
    assert_equal(built("float[n,3,7,8] x", body, tensors, opset=21), *feeds(3, 7, 8))


def test_windows_over_dynamic_axes() -> None:
    body = """
        conv = Conv<auto_pad = "SAME_UPPER", strides = [2,2]>(x, w)
        pool = MaxPool<auto_pad = "SAME_UPPER", kernel_shape = [3,3], strides = [2,2]>(x)
        up = Resize<coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">(x, , twice)
        linear = Resize<mode = "linear">(x, , twice)
        """
    tensors = {"w": normal(4, 3, 3, 3), "twice": torch.tensor([1.0, 1.0, 2.0, 2.0])}
    wide = [{"x": normal(2, 3, height, width)} for height, width in ((6, 9), (7, 5), (12, 8))]
    converted = assert_equal(built("float[n,3,h,w] x", body, tensors), *wide)
    assert converted.graph.inputs[0].shape == ("n", 3, "h", "w")


MODES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric")


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resizing(mode: str) -> None:
    lines = []
    for how in MODES if mode != "cubic" else ("half_pixel", "align_corners"):
        given = f'mode = "{mode}", coordinate_transformation_mode = "{how}"'
        lines.append(f"sized_{how} = Resize<{given}>(x, , , sizes)")
        for nearest in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil") if mode == "nearest" else ():
            lines.append(f'{nearest}_{how} = Resize<{given}, nearest_mode = "{nearest}">(x, , odd)')
        for scales in ("up", "down") if mode != "cubic" else ():
            lines.append(f"{scales}_{how} = Resize<{given}>(x, , {scales})")
    tensors = {
        "up": torch.tensor([1.0, 1.0, 2.0, 3.0]), "odd": torch.tensor([1.0, 1.0, 1.6, 0.6]),
        "down": torch.tensor([1.0, 1.0, 0.5, 1.0]), "sizes": torch.tensor([2, 3, 9, 4]),
    }  # fmt: skip
    assert_equal(built("float[2,3,5,6] x", "\n".join(lines), tensors), {"x": normal(2, 3, 5, 6)})


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int8])
def test_resizing_of_integers(dtype: torch.dtype) -> None:
    """By halves, which floats hold: else the order of the sums decides which fractions are cut off."""
    onnx_type = str(dtype).removeprefix("torch.")
    body = """
        up = Resize<mode = "linear", coordinate_transformation_mode = "asymmetric">(x, , scales)
        halves = Resize<mode = "linear">(x, , scales)
        nearest = Resize<mode = "nearest">(x, , scales)
        """
    x = torch.randint(0, 120, (1, 2, 4, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    graph = built(f"{onnx_type}[1,2,4,5] x", body, {"scales": torch.tensor([1.0, 1.0, 2.0, 2.0])})
    assert_equal(graph, {"x": x})


def test_integers_that_are_not_resized_stay() -> None:
    graph = built("int32[1,1,2,2] x", 'same = Resize<mode = "linear">(x, , ones)', {"ones": torch.ones(4)})
    assert_equal(graph, {"x": torch.full((1, 1, 2, 2), 2**24 + 1, dtype=torch.int32)})  # float32 has no such number


def test_old_resizing_and_sampling() -> None:
    scales = {"scales": torch.tensor([1.0, 1.0, 2.0, 1.5])}
    image = {"x": normal(2, 3, 5, 6)}
    old = 'y = Upsample<mode = "nearest">(x, scales)\nz = Upsample<mode = "linear">(x, scales)'
    assert_equal(built("float[2,3,5,6] x", old, scales, opset=9), image)
    sampled = "\n".join(f'y{m}{p} = GridSample<mode = "{m}", padding_mode = "{p}">(x, grid)'
                        for m in ("linear", "nearest") for p in ("zeros", "border"))  # fmt: skip
    assert_equal(built("float[2,3,5,6] x", sampled, {"grid": normal(2, 4, 4, 2)}, opset=20), image)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_recurrence(direction: str) -> None:
    number = 2 if direction == "bidirectional" else 1
    given = f'hidden_size = 5, direction = "{direction}"'
    body = f"""
        y, h, c = LSTM<{given}>(x, w4, r4, b8)
        y2, h2, c2 = LSTM<{given}>(x, w4, r4, , , state, state)
        g, gh = GRU<{given}, linear_before_reset = 1>(x, w3, r3, b6, , state)
        n, nh = RNN<{given}>(x, w1, r1, b2)
        """
    tensors = {f"w{gates}": normal(number, gates * 5, 4, seed=gates) for gates in (1, 3, 4)}
    tensors |= {f"r{gates}": normal(number, gates * 5, 5, seed=gates) for gates in (1, 3, 4)}
    tensors |= {f"b{gates}": normal(number, gates * 5, seed=gates) for gates in (2, 6, 8)}
    tensors["state"] = normal(number, 3, 5)
    proto = built("float[6,3,4] x", body, tensors, further="h, c, h2, c2, gh, nh")
    converted = assert_equal(proto, {"x": normal(6, 3, 4)}, {"x": normal(6, 3, 4, seed=1)})
    module = converted.graph.module()
    assert len(list(module.parameters())) == 9  # both directions in one; the LSTMs share their weights


