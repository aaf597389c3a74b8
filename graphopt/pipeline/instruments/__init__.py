"""What watches a pipeline: checks and records around every pass. A pass never knows of them."""

from graphopt.pipeline.instruments.agree import Agree
from graphopt.pipeline.instruments.instrument import Instrument
from graphopt.pipeline.instruments.listings import Diff, Dump
from graphopt.pipeline.instruments.log import Log
from graphopt.pipeline.instruments.phases import phase, watched
from graphopt.pipeline.instruments.progress import Progress, display
from graphopt.pipeline.instruments.reproduce import Reproduce
from graphopt.pipeline.instruments.timing import Timing
from graphopt.pipeline.instruments.verify import Verify

__all__ = [
    "Agree", "Diff", "Dump", "Instrument", "Log", "Progress", "Reproduce", "Timing", "Verify", "display", "phase",
    "watched",
]  # fmt: skip
