"""Operators that move, pick and place entries, and what graphs compute of sizes, as ONNX Runtime has them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import model
from tests.operators import X, assert_equal, built, feeds, normal


def test_sizes_stay_dynamic() -> None:
    """What exporters compute of shapes becomes numbers and symbols, and no tensor where nothing else reads it."""
    body = """
        shape = Shape(x)
        n = Gather(shape, zero)
        n1 = Unsqueeze(n, axes)
        sizes = Concat<axis = 0>(n1, minus)
        flat = Reshape(x, sizes)
        twice = Mul(n1, two)
        half = Div(twice, two)
        back = Concat<axis = 0>(half, four, six)
        again = Reshape(flat, back)
        end = Sub(twice, one)
        rows = Slice(x, start, n1)
        ones = ConstantOfShape<value = int64[1] {1}>(length)
        wide = Mul(ones, minus)
        same = Equal(back, wide)
        target = Where(same, ones, back)
        spread = Expand(bias, target)
        zeros = ConstantOfShape(shape)
        count = ReduceProd<keepdims = 0>(shape)
        places = Range(nothing, n, single)
        float = Cast<to = 1>(n)
        scaled = Div(x, float)
        inside = Shape<start = 1, end = -1>(x)
        size = Size(x)
        last = Gather(shape, minus_one)
        root = Sqrt(float)
        scaled2 = Mul(x, root)
        tiled = Tile(x, repeats)
        m = Min(n1, four)
        cut = Slice(x, start, m)
        """
    tensors = {
        "zero": torch.tensor(0), "axes": torch.tensor([0]), "minus": torch.tensor([-1]), "two": torch.tensor([2]),
        "four": torch.tensor([4]), "six": torch.tensor([6]), "one": torch.tensor([1]), "start": torch.tensor([0]),
        "length": torch.tensor([3]), "bias": normal(6), "nothing": torch.tensor(0), "single": torch.tensor(1),
        "minus_one": torch.tensor(-1), "repeats": torch.tensor([1, 2, 1]),
    }  # fmt: skip
    returned = "flat, again, rows, spread, zeros, places, scaled, scaled2, size, count, inside, last, tiled, cut, twice"
    converted = assert_equal(built(X, body, tensors, outputs=returned), *feeds(4, 6))
    assert converted.graph.inputs[0].shape == ("n", 4, 6)
    assert converted.graph.outputs[1].shape == ("n", 4, 6)
    assert converted.graph.outputs[5].shape == ("n",)


def test_moving_entries() -> None:
    body = """
        flat = Flatten<axis = 2>(x)
        flat0 = Flatten<axis = 0>(x)
        zero = Reshape(x, keep)
        u = Unsqueeze(x, ends)
        s = Squeeze(u, ends)
        t = Transpose(x)
        a, b = Split<axis = 2, num_outputs = 2>(x)
        c, d = Split<axis = 1>(x, parts)
        e, f, g = Split<axis = 2, num_outputs = 3>(x)
        depth = DepthToSpace<blocksize = 2>(image)
        depth2 = DepthToSpace<blocksize = 2, mode = "CRD">(image)
        space = SpaceToDepth<blocksize = 2>(plane)
        every = Slice(x, starts, stops, last, steps)
        back = Slice(x, from_end, before, last, minus)
        some = Slice(x, far, before, last, minus2)
        lower = Trilu<upper = 0>(x)
        upper = Trilu(x, one)
        image2 = Concat<axis = 2>(image, image)
        eye = EyeLike(flat0)
        """
    tensors = {
        "keep": torch.tensor([0, -1]), "ends": torch.tensor([0, 2]), "parts": torch.tensor([1, 3]),
        "four": torch.tensor([0, 4, 2, 3]), "starts": torch.tensor([1]), "stops": torch.tensor([2**31 - 1]),
        "last": torch.tensor([-1]), "steps": torch.tensor([2]), "from_end": torch.tensor([-1]),
        "before": torch.tensor([-(2**31)]), "minus": torch.tensor([-1]), "far": torch.tensor([-2]),
        "minus2": torch.tensor([-2]), "one": torch.tensor(1), "even": torch.tensor([0, 1, 4, 6]),
    }  # fmt: skip
    before = "image = Reshape(x, four)\nplane = Reshape(x, even)\n"
    assert_equal(built(X, before + body, tensors, further="b, d, f, g"), *feeds(4, 6))


def test_picking_and_placing_entries() -> None:
    body = """
        one = Gather<axis = 1>(x, first)
        several = Gather<axis = 2>(x, places)
        given = Gather<axis = 1>(x, i)
        rows = Gather(w, ids)
        elements = GatherElements<axis = 2>(x, spread)
        nd = GatherND(table, pairs)
        batched = GatherND<batch_dims = 1>(square, picks)
        hot = OneHot(i, depth, off_on)
        hot0 = OneHot<axis = 0>(i, depth, off_on)
        put = ScatterElements<axis = 1>(square, under, square)
        added = ScatterElements<axis = 1, reduction = "add">(square, under, square)
        most = ScatterElements<axis = 1, reduction = "max">(square, under, square)
        set = ScatterND(table, pairs, news)
        sum = ScatterND<reduction = "add">(table, pairs, news)
        reversed = ReverseSequence<batch_axis = 0, time_axis = 1>(square, lengths)
        """
    tensors = {
        "first": torch.tensor(-1), "places": torch.tensor([[0, -1], [2, 3]]), "w": normal(5, 3),
        "table": normal(3, 4, 2), "pairs": torch.tensor([[0, 1], [2, -1]]), "square": normal(3, 3),
        "picks": torch.tensor([[0], [-1], [1]]), "depth": torch.tensor(4), "off_on": torch.tensor([0.5, 2.0]),
        "under": torch.tensor([[0, 1, 2], [2, 0, 1], [-1, 1, 0]]), "news": normal(2, 2, seed=3),
        "lengths": torch.tensor([1, 3, 2]), "ids": torch.tensor([[0, 4]]),
    }  # fmt: skip
    several = [
        {"x": x["x"], "i": torch.tensor([[0, 3, -1]]), "spread": torch.randint(-6, 6, (len(x["x"]), 4, 2))}
        for x in feeds(4, 6)
    ]
    assert_equal(built(X + ", int64[a,3] i, int64[n,4,2] spread", body, tensors), *several)


SIDE = st.integers(0, 3)
BOUND = st.tuples(st.integers(-9, 9), st.integers(-9, 9), st.sampled_from([-3, -2, -1, 1, 2]))


@settings(max_examples=3, deadline=None)
@given(sides=st.lists(SIDE, min_size=4, max_size=4), first=st.integers(0, 1))
def test_padding(sides: list[int], first: int) -> None:
    tensors = {"sides": torch.tensor(sides), "axes": torch.tensor([first, 2]), "fill": torch.tensor(0.5)}
    modes = ("constant", "reflect", "edge", "wrap")
    body = "\n".join(f'{mode} = Pad<mode = "{mode}">(x, sides, fill, axes)' for mode in modes)
    assert_equal(built("float[5,4,6] x", body, tensors), {"x": normal(5, 4, 6)})


@settings(max_examples=3, deadline=None)
@given(bounds=st.lists(st.tuples(BOUND, BOUND), min_size=5, max_size=5))
def test_slices(bounds: list[tuple[tuple[int, int, int], tuple[int, int, int]]]) -> None:
    """Of any bounds, also beyond the axis."""
    tensors = {"axes": torch.tensor([1, -1])}
    lines = []
    for index, pair in enumerate(bounds):
        names = [f"{name}{index}" for name in ("start", "end", "step")]
        tensors |= {name: torch.tensor(values) for name, values in zip(names, zip(*pair, strict=True), strict=True)}
        lines.append(f"y{index} = Slice(x, {names[0]}, {names[1]}, axes, {names[2]})")
    assert_equal(built(X, "\n".join(lines), tensors), *feeds(4, 6))


def test_branches_are_chosen_by_sizes() -> None:
    body = """
        shape = Shape(x)
        n = Gather(shape, axis)
        one = Equal(n, single)
        y = If<then_branch = a () => (float[n,6] y1) { y1 = Squeeze(x, axes) },
               else_branch = b () => (float[n,4,6] y2) { w2 = Mul(w, w) y2 = Add(x, w2) }>(one)
        """
    tensors = {"axis": torch.tensor(1), "single": torch.tensor(1), "axes": torch.tensor([1]), "w": normal(6)}
    lines = " ".join(body.split())
    proto = model(f"g (float[n,m,6] x) => (float[n,m,6] y) {{ {lines} }}", tensors)
    assert_equal(proto, *feeds(4, 6))


