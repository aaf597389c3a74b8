"""Small models of many kinds, to be damaged."""

from __future__ import annotations

import torch

from tests.models import model

_TEXTS = {
    "a conv net": (17, "g (float[n,2,6,6] x) => (float[n,3] y)", """
        c = Conv<kernel_shape = [3,3], pads = [1,1,1,1]>(x, W, B) r = Relu(c)
        p = MaxPool<kernel_shape = [2,2], strides = [2,2]>(r) m = GlobalAveragePool(p)
        s = Constant<value_ints = [0, -1]>() f = Reshape(m, s) y = Gemm<transB = 1>(f, V)"""),
    "quantized": (13, "g (float[n,8] x) => (float[n,4] y)", """
        q = QuantizeLinear(x, S, Z) d = DequantizeLinear(q, S, Z) w = DequantizeLinear<axis = 1>(Q, R)
        y = MatMul(d, w)"""),
    "branches": (17, "g (float[n,4] x, bool k) => (float[n,4] y)", """
        a = Relu(x)
        b = If(k)<then_branch = t () => (float[n,4] u) { u = Neg(a) },
                  else_branch = e () => (float[n,4] v) { v = Abs(a) }>
        y = Add(b, x)"""),
    "sizes": (18, "g (float[n,2,8] x) => (float[n,m] y)", """
        s = Shape(x) i = Constant<value_ints = [0]>() n = Gather(s, i) l = Constant<value_ints = [-1]>()
        t = Concat<axis = 0>(n, l) r = Reshape(x, t) e = Softmax<axis = -1>(r) y = Mul(e, r)"""),
}  # fmt: skip

_TENSORS = {
    "W": torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0)), "B": torch.ones(3),
    "V": torch.randn(3, 3, generator=torch.Generator().manual_seed(1)), "S": torch.tensor(0.05),
    "Z": torch.tensor(128, dtype=torch.uint8), "R": torch.full((4,), 0.01),
    "Q": torch.arange(32, dtype=torch.int8).reshape(8, 4),
}  # fmt: skip


def sources() -> dict[str, bytes]:
    """By name, the content of a file."""
    found = {}
    for name, (opset, head, body) in _TEXTS.items():
        used = {key: tensor for key, tensor in _TENSORS.items() if any(f" {key}{end}" in body or f"({key}{end}" in body
                                                                       for end in (",", ")"))}  # fmt: skip
        found[name] = model(f"{head} {{ {' '.join(body.split())} }}", used, opset=opset).SerializeToString()
    return found
