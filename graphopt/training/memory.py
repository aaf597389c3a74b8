"""What torch says of a step that cannot be run (out of memory, a batch norm over one sample) -> what to change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from graphopt.errors import UsageError, first_line
from graphopt.pipeline.batches import Batch
from graphopt.training.settings import Settings

_OF_THE_CPU = ("can't allocate memory", "not enough memory")
"""What torch's allocator for the CPU says, on Linux and on Windows, in a plain RuntimeError."""

_OF_BATCH_NORM = "Expected more than 1 value per channel"


@contextmanager
def explained(name: str, settings: Settings, batches: Sequence[Batch]) -> Iterator[None]:
    """A step on these batches. Raises UsageError where memory runs out, and where a batch norm finds one value."""
    try:
        yield
    except Exception as error:
        if _is_out_of_memory(error):
            raise UsageError(f"{name}: {_out_of_memory(settings, batches)} ({first_line(error)})") from error
        if isinstance(error, ValueError) and _OF_BATCH_NORM in str(error):
            raise UsageError(
                f"{name}: a training batch holds one sample, and the statistics of a batch norm need several; leave "
                "a last smaller batch out (drop_last=True), use larger batches, or simplify first, which folds it"
            ) from error
        raise


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Also where a door of `graphopt.errors` has made it the cause of another error."""
    if error is None:
        return False
    of_the_cpu = isinstance(error, RuntimeError) and any(text in str(error) for text in _OF_THE_CPU)
    return of_the_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError) or _is_out_of_memory(error.__cause__)


def _out_of_memory(settings: Settings, batches: Sequence[Batch]) -> str:
    samples = max((len(feed) for one in batches for feed in one.feeds.values() if feed.dim()), default=1)
    narrow = "" if settings.amp != "off" else "amp=bfloat16"
    if samples > 1:
        smaller, more = samples // 2, 2 * settings.accumulate
        fewer = f"give batches of {smaller} with accumulate={more}, whose steps are as large"
        return f"out of memory with batches of {samples}: {fewer}{narrow and f', or {narrow}'}"
    return f"out of memory with batches of one sample: give {narrow or 'shorter samples, or a machine with more'}"
