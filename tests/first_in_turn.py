"""One of two processes of a test: the first works longer than the processes wait for each other.

python first_in_turn.py FILE
"""

import sys
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import distributed_c10d

from fastbert.training.processes import Processes

LIMIT, LONGER = timedelta(seconds=1), 4.0

if __name__ == "__main__":
    file = Path(sys.argv[1])
    joined = Processes.join("cpu")
    distributed_c10d._set_pg_timeout(LIMIT, distributed_c10d._get_default_group())

    def make() -> str:
        if joined.rank == 0:
            time.sleep(LONGER)
            file.write_text("made")
        return file.read_text()

    assert joined.in_turn(make) == "made"
    joined.leave()
