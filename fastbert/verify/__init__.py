"""Checks every operator on a machine against the reference.

Each operator runs its cases forward and backward in each dtype, and is compared with the specification in float64. The
allowed error is twice that of plain torch in the same dtype (see `testing`). A row of the result shows the worst tensor
of an operator, dtype and direction: the one with the largest share of its budget.
"""

from .cases import CASES, DTYPES, LONG, REAL, SMALL, Task, inputs_of, tasks
from .checks import Result, Row, check, verify, worst

__all__ = [
    "CASES", "DTYPES", "LONG", "REAL", "SMALL", "Result", "Row", "Task", "check", "inputs_of", "tasks", "verify",
    "worst",
]  # fmt: skip
