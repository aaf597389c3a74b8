"""What watches a pipeline: checks and records around every pass. A pass never knows of them."""

from graphopt.pipeline.instruments.agree import Agree
from graphopt.pipeline.instruments.instrument import Instrument
from graphopt.pipeline.instruments.listings import Diff, Dump
from graphopt.pipeline.instruments.progress import Progress
from graphopt.pipeline.instruments.reproduce import Reproduce
from graphopt.pipeline.instruments.timing import Timing
from graphopt.pipeline.instruments.verify import Verify

__all__ = ["Agree", "Diff", "Dump", "Instrument", "Progress", "Reproduce", "Timing", "Verify"]
