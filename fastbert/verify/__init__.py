"""Every operator on a machine, held to the reference.

Each operator runs its cases forward and backward in each dtype, against the specification in float64. The error
allowed is twice that of plain torch in the same dtype (see `testing`). A row tells the worst tensor of an operator,
dtype and direction: the one that comes closest to its budget, or passes it.
"""

from .cases import CASES, DTYPES, LONG, REAL, SMALL, Task, inputs_of, tasks
from .checks import Result, Row, check, verify, worst

__all__ = [
    "CASES", "DTYPES", "LONG", "REAL", "SMALL", "Result", "Row", "Task", "check", "inputs_of", "tasks", "verify",
    "worst",
]  # fmt: skip
