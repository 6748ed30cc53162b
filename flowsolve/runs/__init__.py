"""Long runs over data sets and many samples: stopped at any point, they go on without losing or repeating an item, and
any number of processes share them with the same results to the last bit (`flowsolve.runs.engine`)."""

from flowsolve.runs.errors import ItemError, RunError
from flowsolve.runs.nll import nll

__all__ = ["ItemError", "RunError", "nll"]
