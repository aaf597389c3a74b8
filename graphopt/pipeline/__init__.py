"""Passes, their order, their text form, and what they may ask while they run."""

from graphopt.pipeline.passes import (
    Context,
    Pass,
    PassError,
    PerSite,
    Pipeline,
    Repeat,
    Selector,
    Stage,
    UsageError,
    check_order,
    nearest,
    parse,
    run_pass,
    value_text,
)

__all__ = [
    "Context", "Pass", "PassError", "PerSite", "Pipeline", "Repeat", "Selector", "Stage", "UsageError", "check_order",
    "nearest", "parse", "run_pass", "value_text",
]  # fmt: skip
