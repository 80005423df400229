"""The machine as the suites' own files describe it, in what pytest-benchmark writes."""

from fastbert.encoding.encoder import resolve_device

from ..harness import machine


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["device"] = machine.describe(resolve_device("auto"))
