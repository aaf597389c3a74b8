"""The passes that train: what was cut or rounded is learned back. The loop itself is `graphopt.training`."""

from graphopt.passes.recover.distill import Distill
from graphopt.passes.recover.finetune import FineTune

__all__ = ["Distill", "FineTune"]
