"""Worker processes end with their parent, even if the parent is killed and cannot end them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any


def child(function: Callable[..., Any], pipe: Connection, *arguments: Any, name: str | None = None) -> BaseProcess:
    """A process, not started yet, that calls function(pipe, *arguments) and ends when this process ends.

    It watches this process before it imports the function and what the arguments need: importing torch takes seconds,
    and what a child computes can take minutes. All must be picklable; nothing here may import torch.
    """
    work = pickle.dumps((function, arguments))
    return multiprocessing.get_context("spawn").Process(target=_run, args=(pipe, work), name=name, daemon=True)


def _run(pipe: Connection, work: bytes) -> None:
    threading.Thread(target=_end_with_parent, daemon=True, name="end with the parent").start()
    function, arguments = pickle.loads(work)
    function(pipe, *arguments)


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
