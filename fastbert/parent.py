"""A process that works for another one ends with it, even where that one is killed and can end nobody."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """Ends this process of `multiprocessing` when the process that started it ends. A killed parent cannot end its
    children, and what a child is computing can take minutes."""
    threading.Thread(target=_wait_for_the_end, daemon=True, name="end with the parent").start()


def _wait_for_the_end() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
