"""What is done to an ONNX model until it is a graph of ops: the stages, in order.

`OPERATORS` read what each operator of the model means, and run when a graph is made (`OnnxGraph.from_model`). `FORMS`
find what exporters wrote out in several operators; capture runs them once, and checks once that the graph still
computes the same. For a model it then infers shapes again (`Adapter.refine`): ops tell more than the file did. An
operator that is an op by itself needs no stage: `spellings` reads it as it stands.
"""

from __future__ import annotations

from functools import partial

from graphopt.dialects import heads, raising, repeated_heads
from graphopt.dialects.onnx import rotary
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.dialects.onnx.linears import raise_linears, respell_attention
from graphopt.dialects.onnx.positions import raise_positions
from graphopt.dialects.onnx.quantized import raise_quantized
from graphopt.dialects.onnx.recurrent import drop_zero_states, raise_recurrent
from graphopt.dialects.onnx.sequences import raise_sequence_splits
from graphopt.dialects.onnx.spellings import PRODUCT_KINDS
from graphopt.dialects.onnx.whole_slices import drop_whole_slices
from graphopt.dialects.raising import Stage, sweep
from graphopt.ir.constants import fold_constants

OPERATORS = (
    Stage("shapes", OnnxGraph.refine_shapes),
    Stage("integer operators", raise_quantized),
    # Before linears: a stored weight may be a Cast, a Reshape or a norm of what the file holds. A product reads a
    # stored matrix through its Transpose, as a linear does, and folding would make a copy of it.
    Stage("constants", partial(fold_constants, products=PRODUCT_KINDS)),
    Stage("linears", raise_linears),
    Stage("attention with one mask row", respell_attention),
    Stage("recurrent layers", raise_recurrent),
    Stage("sweep", sweep),
)

WITHIN = tuple(
    stage for stage in OPERATORS
    if stage.name in ("integer operators", "constants", "linears", "recurrent layers", "sweep")
)  # fmt: skip
"""Of these, the ones for branches and loop bodies, where the shape of a value may be another each time."""

FORMS = (
    # First: exporters compute the axes, scales and shapes by which the other stages know their forms.
    Stage("constants", fold_constants),
    Stage("whole slices", drop_whole_slices),
    Stage("positions", raise_positions),
    Stage("splits", raise_sequence_splits),
    Stage("zero states", drop_zero_states),
    Stage("flattened linears", raising.raise_flattened_linears),
    *raising.FORMS,
    repeated_heads.STAGE,
    rotary.STAGE,
    heads.STAGE,
    Stage("sweep", sweep),
)
