"""Operators of ONNX -> linear: MatMul, Gemm and Einsum with a stored weight, and an Add of a stored bias after them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from graphopt.dialects.onnx.graph import OnnxGraph, OnnxNode, OnnxValue
from graphopt.dialects.onnx.quantized import dequantized_weight
from graphopt.dialects.onnx.spellings import STANDARD, repeats_over_queries
from graphopt.dialects.onnx.tensors import FLOATS
from graphopt.ir.constants import static_sizes
from graphopt.ir.graph import Value

PRODUCTS = ("MatMul", "Gemm", "Einsum")
"""The operators that `raise_linears` reads."""


def raise_linears(graph: OnnxGraph) -> None:
    """Put a linear in place of each product with a stored weight that equals one, with the bias that is added to it.

    Left as they are: a product with several weights (a stored tensor with axes of a batch), and one whose stored
    operand is the left one of a MatMul, as a linear would have to transpose its input and its result.
    """
    products = _Products(graph)
    for native in list(graph.model.graph):
        node = OnnxNode(graph, native)
        if native.domain in STANDARD and native.op_type in PRODUCTS:
            products.raise_(node)
        elif node.kind == "linear" and node.bias is None:  # out of an operator on integers
            weight = node.required("weight")
            if (added := products.bias_behind(node, weight)) is not None:
                graph.replace(added[0], graph.emit("linear", node.input, weight, added[1], at=node))
                graph.erase(node)


def respell_attention(graph: OnnxGraph) -> None:
    """Emit each attention whose mask has one row for all queries again, in a spelling that ONNX Runtime can run."""
    for node in graph.sites("attention"):
        if isinstance(node, OnnxNode) and node.native.op_type == "Attention" and repeats_over_queries(*node.operands):
            graph.replace(node, graph.emit("attention", *node.operands, at=node, **node.attributes))


class _Products:
    """Raises the products of a graph one by one; what it makes of a stored weight, all its readers share."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self._matrices: dict[tuple[ir.Value, tuple[int, ...], int], OnnxValue] = {}
        """By stored tensor, order of its axes, and number of those that are outputs: the matrix (out, in) of it."""

    def raise_(self, node: OnnxNode) -> None:
        """Replace a product by a linear, where it equals one."""
        match node.native.op_type:
            case "MatMul":
                self._raise_matmul(node)
            case "Gemm":
                self._raise_gemm(node)
            case "Einsum":
                self._raise_einsum(node)

    # --- the three operators

    def _raise_matmul(self, node: OnnxNode) -> None:
        """x @ W, with W of shape (in, out), (1, ..., 1, in, out) or (in,), and x of rank 1 or more.

        A linear of unknown rank is one too: behind a custom operator nothing states a shape.
        """
        x, stored = self.graph.values(node.native.inputs)
        if x is None or stored is None or x.is_constant:
            return
        weight = self._weight(stored, node, kn=True)
        if weight is not None:
            if x.rank == 1:
                row = self._emit("unsqueeze", x, at=node, axes=(0,))
                y = self._emit("linear", row, weight, at=node)
                self.graph.replace(node, self._emit("squeeze", y, at=node, axes=(0,)))
            else:
                self._replace(node, x, weight)
            return
        sizes = static_sizes(stored.shape) if stored.is_constant and stored.dtype in FLOATS else None
        if not sizes or x.rank in (None, 1):
            return
        rank = len(sizes)
        if rank == 1:
            y = self._emit("linear", x, self._matrix(stored, (0,), 0), at=node)
            self.graph.replace(node, self._emit("squeeze", y, at=node, axes=(x.rank - 1,)))
        elif rank > 2 and math.prod(sizes[:-2]) == 1:
            weight = self._matrix(stored, (rank - 1, *range(rank - 1)), 1)
            if x.rank >= rank:
                self._replace(node, x, weight)
            else:
                y = self._emit("linear", x, weight, at=node)
                self.graph.replace(node, self._emit("unsqueeze", y, at=node, axes=tuple(range(rank - x.rank))))

    def _raise_gemm(self, node: OnnxNode) -> None:
        """alpha · x @ W + beta · C, where the factors go into the weight and the bias."""
        graph = self.graph
        x, stored, *rest = graph.values(node.native.inputs)
        attributes: dict[str, Any] = _GEMM | {a.name: a.value for a in node.native.attributes.values()}
        alpha, beta = attributes["alpha"], attributes["beta"]
        if x is None or stored is None or x.is_constant:
            return
        weight = self._weight(stored, node, kn=not attributes["transB"])
        width = (weight.shape or ("?",))[0] if weight is not None else "?"
        if weight is None or not isinstance(width, int):
            return
        addend = rest[0] if rest and beta != 0 else None
        bias = None if addend is None else self._bias(addend, width, beta)
        computed = bias is None and addend is not None
        if graph.opset < 7 and (computed or alpha != 1):  # which has another way to broadcast
            return
        if attributes["transA"]:
            x = self._emit("transpose", x, at=node, perm=(1, 0))
        if alpha != 1:
            scaled = self._scaled(weight, alpha, node)
            x = x if scaled is not None else self._emit("mul", x, self._number(x, alpha), at=node)
            weight = weight if scaled is None else scaled
        if not computed or addend is None:
            self._replace(node, x, weight, bias, may_add=addend is None)
            return
        addend = addend if beta == 1 else self._emit("mul", addend, self._number(addend, beta), at=node)
        self.graph.replace(node, self._emit("add", self._emit("linear", x, weight, at=node), addend, at=node))

    def _raise_einsum(self, node: OnnxNode) -> None:
        """A sum of products over the letters that x and W share, where all other letters are in the result."""
        graph = self.graph
        equation = str(node.native.attributes["equation"].value).replace(" ", "")
        terms, arrow, result = equation.partition("->")
        sides, values = terms.split(","), graph.values(node.native.inputs)
        if len(sides) != 2 or len(values) != 2 or "." in equation:
            return
        if not arrow:  # then each letter that stands once is in the result
            result = "".join(sorted(letter for letter in set(terms) - {","} if terms.count(letter) == 1))
        if values[1] is None or not values[1].is_constant:
            sides, values = sides[::-1], values[::-1]
        (x, stored), (letters, of_weight) = values, sides
        if x is None or stored is None or x.is_constant or not stored.is_constant or stored.dtype not in FLOATS:
            return
        if any(len(set(term)) < len(term) for term in (*sides, result)):
            return
        sizes = dict(zip(of_weight, static_sizes(stored.shape) or (), strict=False))
        summed = [letter for letter in letters if letter in of_weight and letter not in result]
        rows = [letter for letter in result if letter in letters]
        columns = [letter for letter in result if letter in of_weight]
        found = dict(zip(letters, x.shape or (), strict=False))
        if sorted(summed + columns) != sorted(of_weight) or sorted(summed + rows) != sorted(letters):
            return
        if set(rows) & set(columns) or not (rows and summed and columns) or len(sizes) != len(of_weight):
            return
        if any(found.get(letter) != sizes[letter] for letter in summed):
            return
        x = self._permuted(x, letters, [*rows, *summed], node)
        weight = self._matrix(stored, [of_weight.index(one) for one in (*columns, *summed)], len(columns))
        if len(summed) > 1:
            x = self._regrouped(x, len(rows), [math.prod(sizes[one] for one in summed)], node)
        if len(columns) == 1 and [*rows, *columns] == list(result):
            self._replace(node, x, weight)
            return
        y = self._emit("linear", x, weight, at=node)
        if len(columns) > 1:
            y = self._regrouped(y, len(rows), [sizes[one] for one in columns], node)
        graph.replace(node, self._permuted(y, [*rows, *columns], list(result), node))

    # --- weights

    def _weight(self, value: OnnxValue, at: OnnxNode, *, kn: bool) -> OnnxValue | None:
        """A stored matrix of floats, also one that is read through a dequantize, as (out, in); None for others.

        kn: whether the reader takes it as (in, out).
        """
        transposed, native = _through_transposes(value.native)
        if native is not None and (held := OnnxValue(self.graph, native)).is_constant:
            view = held.transpose() if transposed != kn else held
        else:
            found = dequantized_weight(self.graph, value, kn, at)
            if found is None:
                return None
            view = found
        return view if view.rank == 2 and view.dtype in FLOATS else None

    def _matrix(self, stored: OnnxValue, order: Sequence[int], columns: int) -> OnnxValue:
        """A stored tensor as a matrix (out, in): its axes in `order`, of which the first `columns` are outputs."""
        if stored.rank == 2 and columns == 1:
            return stored if tuple(order) == (0, 1) else stored.transpose()
        key = stored.native, tuple(order), columns
        if key not in self._matrices:
            tensor = self.graph.constant(stored)
            assert tensor is not None  # it is stored
            out = math.prod(tensor.shape[axis] for axis in order[:columns])
            matrix = tensor.permute(*order).reshape(out, -1).contiguous()
            self._matrices[key] = self.graph.add_constant(matrix, stored.name)
        return self._matrices[key]

    def _scaled(self, weight: OnnxValue, factor: float, at: OnnxNode) -> OnnxValue | None:
        """A weight times a number; None where other nodes read it too, and it would be stored twice."""
        graph = self.graph
        tensor = graph.constant(weight)
        if tensor is not None:
            return None if len(weight.users) > 1 else graph.add_constant(tensor * factor, weight.name)
        node = weight.producer
        assert node is not None  # the dequantize of a stored weight
        x, scale, *zero_point = node.operands
        steps = graph.constant(scale) if scale is not None else None
        assert steps is not None
        return graph.emit(node, x, graph.add_constant(steps * factor), *zero_point, at=at)

    # --- biases

    def _bias(self, value: OnnxValue, width: int, factor: float = 1.0) -> OnnxValue | None:
        """What is added to a linear of `width` outputs, times a number, as its bias; None where it is no such row."""
        if value.shape == (width,) and factor == 1:
            return value
        tensor = self.graph.constant(value)
        if tensor is None or tensor.numel() not in (1, width) or (tensor.dim() and tensor.shape[-1] != tensor.numel()):
            return None
        row = (tensor * factor).reshape(-1).expand(width).contiguous()
        return self.graph.add_constant(row, value.name)

    def bias_behind(self, node: OnnxNode, weight: Value) -> tuple[OnnxNode, OnnxValue] | None:
        """The Add that alone reads a node and adds a stored row to it, and that row as a bias."""
        user, width = node.result.only_user, (weight.shape or ("?",))[0]
        if not isinstance(user, OnnxNode) or not isinstance(width, int) or node.result.rank is None:
            return None
        native = user.native
        if native.graph is not self.graph.model.graph or native.op_type != "Add" or native.domain not in STANDARD:
            return None
        for value in self.graph.values(native.inputs):
            if value is None or not value.is_constant or (value.rank or 0) > node.result.rank:
                continue
            if value.shape == (width,) or (self.graph.opset >= 7 and not native.attributes):
                bias = self._bias(value, width)
                if bias is not None:
                    return user, bias
        return None

    # --- emitting

    def _replace(
        self, node: OnnxNode, x: Value, weight: OnnxValue, bias: OnnxValue | None = None, *, may_add: bool = True
    ) -> None:
        """Put a linear in place of a node, with the bias that is added after it where `may_add`."""
        site = node
        if bias is None and may_add and (added := self.bias_behind(node, weight)) is not None:
            site, bias = added
        self.graph.replace(site, self._emit("linear", x, weight, bias, at=node))
        if site is not node:
            self.graph.erase(node)

    def _emit(self, kind: str, *operands: Value | None, at: OnnxNode, **attributes: Any) -> OnnxValue:
        return self.graph.emit(kind, *operands, at=at, **attributes)

    def _number(self, like: Value, number: float) -> OnnxValue:
        return self.graph.add_constant(torch.tensor(number, dtype=like.dtype))

    def _permuted(self, value: OnnxValue, axes: Sequence[str], order: Sequence[str], at: OnnxNode) -> OnnxValue:
        perm = tuple(list(axes).index(one) for one in order)
        return value if perm == tuple(range(len(perm))) else self._emit("transpose", value, at=at, perm=perm)

    def _regrouped(self, value: OnnxValue, leading: int, sizes: Sequence[int], at: OnnxNode) -> OnnxValue:
        """A value whose first axes stay, and whose others become axes of these sizes."""
        shape: Tensor = torch.tensor([*[0] * leading, *sizes])
        return self._emit("onnx.Reshape", value, self.graph.add_constant(shape), at=at)


_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}


def _through_transposes(native: ir.Value | None) -> tuple[bool, ir.Value | None]:
    """What a matrix is made of by Transposes alone, and whether they swap its axes."""
    swaps = False
    while native is not None and (producer := native.producer()) is not None:
        perm = producer.attributes.get("perm")
        if producer.op_type != "Transpose" or producer.domain not in STANDARD or len(native.shape or ()) != 2:
            break
        if perm is None or list(perm.as_ints()) == [1, 0]:
            swaps = not swaps
        native = producer.inputs[0]
    return swaps, native
