"""Operators entry by entry and along axes compute in torch what ONNX Runtime computes."""

from __future__ import annotations

import pytest
import torch

from tests.operators import X, assert_equal, built, feeds, normal

EACH = (
    "Abs", "Acos", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Cos", "Cosh", "Floor", "Mish", "Neg", "Round", "Sign",
    "Sin", "Sinh", "Softplus", "Softsign", "Tan", "Celu", "Elu", "HardSigmoid", "Selu", "Shrink", "ThresholdedRelu",
    "IsInf", "Gelu", "Relu", "Sigmoid", "HardSwish", "LeakyRelu", "Erf", "Exp", "Tanh", "IsNaN", "LogSoftmax",
    "Hardmax", "Softmax",
)  # fmt: skip


def test_each_entry() -> None:
    body = "\n".join(f"{name.lower()} = {name}(t)" for name in EACH) + """
        celu2 = Celu<alpha = 0.7>(x)
        elu2 = Elu<alpha = 0.3>(x)
        selu2 = Selu<alpha = 1.1, gamma = 0.8>(x)
        sigmoid2 = HardSigmoid<alpha = 0.3, beta = 0.4>(x)
        shrink2 = Shrink<lambd = 0.4, bias = 0.1>(x)
        threshold2 = ThresholdedRelu<alpha = 0.2>(x)
        inf2 = IsInf<detect_negative = 0>(big)
        log = Log(positive)
        acosh = Acosh(above)
        prelu = PRelu(x, slope)
        clip = Clip(x, lowest, highest)
        """
    before = """
        t = Tanh(x)
        positive = Exp(x)
        above = Add(positive, one)
        big = Div(x, zero)
        lowest = ReduceMin<keepdims = 0>(t)
        highest = ReduceMax<keepdims = 0>(t)
        """
    tensors = {"slope": normal(4, 1), "one": torch.tensor(1.0), "zero": torch.tensor(0.0)}
    assert_equal(built(X, before + body, tensors), *feeds(4, 6))


def test_two_entries_and_more() -> None:
    body = """
        sum = Sum(x, y, x)
        mean = Mean(x, y, y)
        max = Max(x, y, c)
        min = Min(x, c)
        mod = Mod<fmod = 1>(x, y)
        whole = Cast<to = 7>(ten)
        remainder = Mod(whole, three)
        quotient = Div(whole, three)
        power = Pow(whole, two)
        square = Pow(x, two_float)
        equal = Equal(whole, three)
        greater = Greater(x, y)
        less = Less(x, y)
        greaterequal = GreaterOrEqual(x, y)
        lessequal = LessOrEqual(x, y)
        and = And(greater, less)
        or = Or(greater, equal)
        xor = Xor(greater, lessequal)
        not = Not(or)
        where = Where(greater, x, c)
        like = CastLike(whole, x)
        sub = Sub(c, x)
        div = Div(x, c)
        small = Cast<to = 2>(ten)
        shift = BitShift<direction = "LEFT">(small, bits)
        bits_and = BitwiseAnd(small, bits)
        bits_or = BitwiseOr(small, bits)
        bits_xor = BitwiseXor(small, bits)
        bits_not = BitwiseNot(small)
        """
    tensors = {
        "c": torch.tensor(0.3), "three": torch.tensor([3]), "two": torch.tensor(2), "two_float": torch.tensor(2.0),
        "tens": torch.tensor(10.0), "bits": torch.tensor(2, dtype=torch.uint8),
    }  # fmt: skip
    several = feeds(4, 6, y=normal(1, 6, seed=9))
    assert_equal(built(X + ", float[1,6] y", "ten = Mul(x, tens)\nten2 = Abs(ten)\n" + body, tensors), *several)


def test_along_axes() -> None:
    reductions = ("L1", "L2", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
    body = "positive = Exp(x)\n" + "\n".join(
        f"all{name} = Reduce{name}(x)\n"
        f"last{name} = Reduce{name}<keepdims = 0>(x, last)\n"
        f"two{name} = Reduce{name}<keepdims = 1>(x, two)\n"
        f"none{name} = Reduce{name}<noop_with_empty_axes = 1>(x, none)"
        for name in reductions
    ) + """
        logsum = ReduceLogSum(positive, last)
        whole = Cast<to = 7>(x)
        total = ReduceSum(whole, last)
        most = ArgMax<axis = 1>(x)
        least = ArgMin<axis = -1, keepdims = 0>(x)
        latest = ArgMax<axis = 2, select_last_index = 1>(whole)
        running = CumSum(x, axis)
        before = CumSum<exclusive = 1, reverse = 1>(x, axis)
        top, place = TopK<axis = 1>(x, k)
        low, place2 = TopK<axis = 2, largest = 0>(x, k)
        soft = Softmax<axis = 1>(x)
        hard = Hardmax<axis = 1>(x)
        product = Einsum<equation = "nab,nac->nbc">(x, x)
        weighed = Einsum<equation = "nab,bc->nac">(x, w)
        """
    tensors = {
        "last": torch.tensor([-1]), "two": torch.tensor([1, 2]), "none": torch.empty(0, dtype=torch.int64),
        "axis": torch.tensor(1), "k": torch.tensor([2]), "w": normal(6, 3),
    }  # fmt: skip
    assert_equal(built(X, body, tensors, further="place, place2"), *feeds(4, 6))


@pytest.mark.parametrize("opset", [11, 23])
def test_gemm_and_flattened_softmax(opset: int) -> None:
    body = """
        a = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(x, w, c)
        b = Gemm<transA = 1>(x, x)
        d = Gemm(x, u, row)
        s = Softmax<axis = 0>(x)
        l = LogSoftmax<axis = 1>(x)
        """
    tensors = {"w": normal(3, 4), "c": normal(3), "u": normal(4, 3), "row": normal(1, 1)}
    assert_equal(built("float[n,4] x", body, tensors, opset=opset), *feeds(4))


def test_norms() -> None:
    body = """
        i = InstanceNormalization<epsilon = 0.01>(x, w, b)
        g = GroupNormalization<num_groups = 2>(x, w, b)
        l, m, d = LayerNormalization<axis = 2>(x, v, v)
        r = RMSNormalization<axis = 1>(x, v)
        p = LpNormalization<axis = 1, p = 1>(x)
        q = LpNormalization(x)
        odd = LRN<size = 3, alpha = 0.1>(image)
        mean = MeanVarianceNormalization(image)
        """
    tensors = {"w": normal(4), "b": normal(4, seed=1), "v": normal(6), "four": torch.tensor([0, 4, 2, 3])}
    assert_equal(built(X, "image = Reshape(x, four)\n" + body, tensors, further="m"), *feeds(4, 6))


def test_operators_of_onnx_runtime() -> None:
    body = """
        gelu = com.microsoft.Gelu(x)
        fast = com.microsoft.FastGelu(x, b)
        bias = com.microsoft.BiasGelu(x, b)
        quick = com.microsoft.QuickGelu(x)
        product = com.microsoft.FusedMatMul<alpha = 0.5, transB = 1>(x, x)
        norm, n1, n2, sum = com.microsoft.SkipLayerNormalization<epsilon = 0.001>(x, x, w, b, b)
        rms = com.microsoft.SkipSimplifiedLayerNormalization(x, x, w)
        """
    tensors = {"w": normal(6), "b": normal(6, seed=1)}
    assert_equal(built(X, body, tensors, further="sum"), *feeds(4, 6))


