"""How a GPU is timed, on a simulated one: a queue with its own clock, and a Python that takes time to fill it."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness import case, schema, timing
from benchmarks.harness.case import Case, Row, measure

CUDA = torch.device("cuda")
LAUNCH = 5e-6  # seconds that Python takes to queue one kernel


class Gpu:
    """The part of torch.cuda that timing.py uses. `now` is Python's time; at `free` the queue will be empty."""

    def __init__(self, monkeypatch, cycles: float = 2e9):
        self.now, self.free, self.cycles, self.held = 0.0, 0.0, cycles, []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(gpu.now, gpu.free)

            def query(self):
                return self.at <= gpu.now

            def synchronize(self):
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        monkeypatch.setattr(timing.torch.cuda, "Event", Event)
        monkeypatch.setattr(timing.torch.cuda, "_sleep", self.spin)
        monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda device=None: self.wait())
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now, sleep=lambda s: None))

    def spin(self, cycles: int) -> None:
        self.held.append(cycles / self.cycles)
        self.kernel(cycles / self.cycles, 0.0)

    def kernel(self, seconds: float, launch: float = LAUNCH) -> None:
        self.now += launch
        self.free = max(self.free, self.now) + seconds

    def wait(self) -> None:
        self.now = max(self.now, self.free)

    def call(self, kernels: int, device_s: float, host_s: float):
        """A run of so many kernels that takes these seconds of the GPU and of Python."""

        def run():
            for _ in range(kernels):
                self.kernel(device_s / kernels, host_s / kernels)

        return run


REAL = timing.Clock


def clock(holds: bool = True) -> timing.Clock:
    made = REAL(CUDA)
    made.holds = holds
    return made


@pytest.mark.parametrize("cycles", [0.345e9, 1.98e9], ids=["345 MHz", "1980 MHz"])
def test_events_do_not_time_python(monkeypatch, cycles):
    """Attention forward and backward takes 600 us of Python and 100 us of an H200. A hold of a fixed half millisecond
    ended too early, and the events showed 200 us."""
    gpu = Gpu(monkeypatch, cycles)
    run, held = gpu.call(12, device_s=100e-6, host_s=600e-6), clock()
    pace = held.pace(run)
    assert pace.hold_s > 600e-6
    assert held(run, 1, pace.hold_s) == pytest.approx(100e-6)
    assert (pace.seconds, pace.device_s) == (pytest.approx(100e-6), pytest.approx(100e-6))
    assert pace.host_s == pytest.approx(600e-6)
    assert pace.host_bound
    assert clock().pace(gpu.call(12, device_s=900e-6, host_s=600e-6)).host_bound is False


def test_a_clock_that_speeds_up_holds_long_enough(monkeypatch):
    """A GPU that idles at 345 MHz runs at 1980 MHz when busy: the same cycles then hold it a sixth as long."""
    gpu = Gpu(monkeypatch, 0.345e9)
    run = gpu.call(12, device_s=100e-6, host_s=600e-6)
    spin = gpu.spin

    def spin_and_speed_up(cycles):
        gpu.cycles = 0.345e9 if cycles == timing.SPIN_CYCLES else 1.98e9
        spin(cycles)

    monkeypatch.setattr(timing.torch.cuda, "_sleep", spin_and_speed_up)
    held = clock()
    pace = held.pace(run)
    assert held(run, 1, pace.hold_s) == pytest.approx(100e-6)
    assert pace.host_bound


def test_a_call_that_python_was_late_for_is_timed_again(monkeypatch):
    gpu = Gpu(monkeypatch)
    late = iter([0.0, 0.0, 0.0, 5e-3, 0.0])  # the delays of calls: free, held, timed, timed, again

    def run():
        gpu.now += next(late)
        gpu.kernel(100e-6, 50e-6)

    held = clock()
    pace = held.pace(run)
    assert [held(run, 1, pace.hold_s) for _ in range(2)] == [pytest.approx(100e-6)] * 2
    assert next(late, None) is None


@pytest.mark.parametrize(("python", "bound"), [(2e-3, True), (0.2e-3, False)])
def test_a_call_that_waits_for_the_gpu_is_never_held(monkeypatch, python, bound):
    """Its time is what the caller sees. It is host-bound if the GPU alone would be faster."""
    gpu = Gpu(monkeypatch)
    queue = gpu.call(10, device_s=1e-3, host_s=python)

    def run():
        queue()
        gpu.wait()

    held = clock()
    pace = held.pace(run)
    assert (pace.hold_s, pace.host_s) == (0.0, None)
    assert pace.device_s == pytest.approx(1e-3)
    assert pace.host_bound is bound
    n = len(gpu.held)
    assert held(run, 1, pace.hold_s) == pytest.approx(max(1e-3, python) + (1e-4 if bound else python / 10), rel=0.01)
    assert len(gpu.held) == n


def test_models_are_timed_as_their_caller_sees_them(monkeypatch):
    """Not held, so the time includes Python's part; a held call beside it shows that the model is host-bound."""
    gpu = Gpu(monkeypatch)
    run = gpu.call(100, device_s=1e-3, host_s=4e-3)
    pace = clock(holds=False).pace(run)
    assert pace.hold_s == 0.0
    assert pace.seconds == pytest.approx(4e-3, rel=0.02)
    assert pace.device_s == pytest.approx(1e-3)
    assert pace.host_bound


def test_a_call_too_long_to_hold_is_timed_without_a_claim(monkeypatch):
    gpu = Gpu(monkeypatch)
    pace = clock().pace(gpu.call(10, device_s=0.1, host_s=timing.HOLD_MOST))
    assert (pace.hold_s, pace.device_s, pace.host_bound) == (0.0, None, None)


def test_rows_say_that_they_are_host_bound(monkeypatch):
    """One row of each kind runs through a whole case, and the result follows the schema."""
    gpu = Gpu(monkeypatch)
    ones = torch.ones(10)
    of = {"fastbert": (100e-6, 600e-6), "slow": (900e-6, 60e-6)}

    def made(name):
        run = gpu.call(4, *of[name])
        return lambda: (run(), ones)[1]

    monkeypatch.setattr(case.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(case, "_memory_and_energy", lambda *_: None)
    monkeypatch.setattr(timing, "graph_of", lambda run: gpu.call(1, 90e-6, 9e-6))
    monkeypatch.setattr(timing, "Clock", lambda device, cold_cache: clock(cold_cache))
    rows = [Row(name, name, lambda name=name: made(name)) for name in of]
    work = Case("kernels", "base_natural", rows, lambda: [ones.double()], lambda: [ones], tokens=10)
    ceilings = {"gemm_tflops": {"float32": 1.0}, "copy_gbs": 1.0}
    found = {r["row"]: r for r in measure(work, CUDA, timing.GPU, ceilings)}
    assert [found[name]["host_bound"] for name in of] == [True, False]
    assert [found[name]["median_s"] for name in of] == [pytest.approx(seconds) for seconds, _ in of.values()]
    assert found["fastbert"]["host_s"] == pytest.approx(600e-6)
    assert (found["fastbert"]["graph_s"], found["slow"]["graph_s"]) == (pytest.approx(90e-6), None)
    rule = schema.schema()["properties"]["rows"]["items"]
    assert [problem for row in found.values() for problem in schema.problems(row, rule)] == []
    assert schema.problems(found["slow"] | {"host_bound": "yes"}, rule)
