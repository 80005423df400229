"""Adds the description of the machine, as in other result files, to the files of pytest-benchmark."""

from fastbert.encoding.encoder import resolve_device

from ..harness import machine


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["device"] = machine.describe(resolve_device("auto"))
