"""Passes, their order, their text form, and what they may ask while they run."""

from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.runner import Pipeline, Repeat
from graphopt.pipeline.selectors import PerSite, Selector
from graphopt.pipeline.text import parse

__all__ = ["Context", "Pass", "PerSite", "Pipeline", "Repeat", "Selector", "Stage", "parse"]
