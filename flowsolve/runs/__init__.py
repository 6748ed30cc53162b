"""Long runs over data sets and many samples: stopped at any point, they go on without losing or repeating an item, and
any number of processes share them with the same results to the last bit (`flowsolve.runs.engine`).
"""

from flowsolve.runs.errors import ItemError, RunError
from flowsolve.runs.inverting import invert
from flowsolve.runs.measuring import nll
from flowsolve.runs.ranks import Rank
from flowsolve.runs.sampling import sample, start_time

__all__ = ["ItemError", "Rank", "RunError", "invert", "nll", "sample", "start_time"]
