"""Passes, their order, their text form, and what they may ask while they run."""

from graphopt.errors import PassError, UsageError, nearest
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.runner import Pipeline, Repeat, check_order, run_pass
from graphopt.pipeline.selectors import PerSite, Selector
from graphopt.pipeline.spelling import value_text
from graphopt.pipeline.text import parse

__all__ = [
    "Context", "Pass", "PassError", "PerSite", "Pipeline", "Repeat", "Selector", "Stage", "UsageError", "check_order",
    "nearest", "parse", "run_pass", "value_text",
]  # fmt: skip
