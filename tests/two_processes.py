"""Runs a script of these tests in two processes at once, as torchrun does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

PATIENCE = 300  # seconds; a process that takes longer counts as hanging


def run_in_two(script: str, *words) -> None:
    """`python tests/SCRIPT WORDS...` as ranks 0 and 1 over gloo, with one thread each; both must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name(script), *words]
    started = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in started:
        _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, said
