"""What is done to a torch.fx graph until it is a graph of ops: one list of stages, in order.

An operator that aten spells in several ways has one spelling as soon as the program is read (`reading.Loader`); the
stages here find what people and libraries wrote out in several operators.
"""

from __future__ import annotations

from graphopt.dialects import heads, raising, repeated_heads
from graphopt.dialects.fx.linears import raise_products
from graphopt.dialects.fx.recurrent import raise_recurrent
from graphopt.dialects.raising import Stage, sweep
from graphopt.ir.constants import fold_constants

STAGES = (
    # Before constants, which make stored tensors of the zeros that a layer of fixed sizes begins with.
    Stage("recurrent layers", raise_recurrent),
    # Before the other stages: programs compute the scales and shapes by which these know their forms.
    Stage("constants", fold_constants),
    Stage("linears", raise_products),
    Stage("flattened linears", raising.raise_flattened_linears),
    *raising.FORMS,
    repeated_heads.STAGE,
    heads.STAGE,
    Stage("sweep", sweep),
)
