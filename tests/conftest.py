"""Test set-up: FASTBERT_TEST says which of three ways to compute is tested.

    triton   (the default) the Triton kernels: on a GPU, or without one on CPU tensors through Triton's interpreter,
             which runs the kernels' source; FASTBERT_TEST_ARCH=sm_90 (sm_80, sm_100, sm_120) runs them compiled for
             that architecture instead, their PTX executed by `fastbert.emulator`
    cpp      what a machine without a GPU runs as installed: the C++ operators, and no interpreter
    torch    what such a machine runs where the C++ operators could not be built: PyTorch's own operators

A test that would compute the same in several ways runs in one only (`_ways`). Its mark or its parameter `impl` decides:

    once                       does not depend on the way: runs in `triton` only
    impl="reference"           is plain torch in every way: runs in `triton` only
    native, impl="native"      names that implementation: runs in `cpp` and `torch`; with a GPU also in `triton`
    cpp                        calls the C++ operators: runs in `cpp` only, and is skipped where they cannot exist
    triton, impl="triton"      runs the Triton kernels: in `triton` only, and is skipped where they do not run
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path


def _gpu_present() -> bool:
    """Determined in another process, because torch must not be imported here before TRITON_INTERPRET is set."""
    question = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", question], check=False).returncode == 0


WAY = os.environ.get("FASTBERT_TEST", "triton")
EMULATED = os.environ.get("FASTBERT_TEST_ARCH") if WAY == "triton" else None
if EMULATED or WAY in ("cpp", "torch"):
    os.environ["TRITON_INTERPRET"] = "0"
    # the tests then take CPU tensors, and so does the emulator
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""
elif "TRITON_INTERPRET" not in os.environ and not _gpu_present():
    os.environ["TRITON_INTERPRET"] = "1"
if WAY in ("cpp", "torch"):
    os.environ["FASTBERT_CPP"] = "1" if WAY == "cpp" else "0"

import pytest
import torch

from fastbert.kernels import _device

if _device.INTERPRETING and _device.HAS_TRITON:
    _interpreter = runpy.run_path(str(Path(__file__).with_name("interpreter.py")))
    _interpreter["hasten"]()
    _interpreter["broadcast_conditions"]()
if EMULATED:
    from fastbert.emulator import emulate

    emulate(EMULATED)


def pytest_configure(config):
    if WAY not in ("triton", "cpp", "torch"):
        raise pytest.UsageError(f"FASTBERT_TEST must be triton, cpp or torch, got {WAY!r}")
    from fastbert.kernels.cpu import operators as cpp

    missing = cpp.load()[1]
    if WAY == "cpp" and missing and torch.backends.cpu.get_cpu_capability().startswith(("AVX2", "AVX512")):
        raise pytest.UsageError(f"FASTBERT_TEST=cpp tests the C++ operators, and there are none: {missing}")


def pytest_report_header(config):
    from fastbert.kernels.cpu import operators as cpp

    triton = "on a GPU" if torch.cuda.is_available() else f"emulated, {EMULATED}" if EMULATED else "not run"
    if _device.INTERPRETING:
        triton = "interpreted"
    return f"fastbert: FASTBERT_TEST={WAY}; Triton kernels: {triton}; C++ operators: {cpp.load()[1] or 'built'}"


def _impl(item) -> str | None:
    """The parameter `impl` of a test that has one."""
    return item.callspec.params.get("impl") if hasattr(item, "callspec") else None


def _ways(item) -> tuple[str, ...]:
    """The ways in which a test runs: those in which it computes something that no other way tests."""
    impl = _impl(item)
    if item.get_closest_marker("once") or item.get_closest_marker("triton") or impl in ("triton", "reference"):
        return ("triton",)
    if item.get_closest_marker("cpp"):
        return ("cpp",)
    if item.get_closest_marker("native") or impl == "native":
        return ("triton", "cpp", "torch") if torch.cuda.is_available() else ("cpp", "torch")
    return ("triton", "cpp", "torch")


def pytest_collection_modifyitems(config, items):
    """Deselects what another way tests; skips what needs Triton or the C++ operators where these do not run."""
    from fastbert.functional import why_not_triton
    from fastbert.kernels.cpu import operators as cpp

    elsewhere = [item for item in items if WAY not in _ways(item)]
    if elsewhere:
        items[:] = [item for item in items if WAY in _ways(item)]
        config.hook.pytest_deselected(items=elsewhere)
    for item in items:
        if item.get_closest_marker("cpp") and (reason := cpp.load()[1]):
            item.add_marker(pytest.mark.skip(reason=f"no C++ operators: {reason}"))
        if _impl(item) == "triton" or item.get_closest_marker("triton"):
            on_gpu = torch.cuda.is_available() and "device" in item.fixturenames
            if reason := why_not_triton(torch.device("cuda" if on_gpu else "cpu")):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels under test run: the GPU, or CPU tensors under the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def even_products(monkeypatch):
    """For tests that compare bits: the interpreter's products of a row do not depend on the place of the row."""
    if _device.INTERPRETING and _device.HAS_TRITON:
        runpy.run_path(str(Path(__file__).with_name("interpreter.py")))["multiply_evenly"](monkeypatch)


@pytest.fixture(scope="session")
def hearing() -> list[str]:
    """What stands before a command that must react to Ctrl-C. A shell starts its background jobs, such as the tests,
    with SIGINT ignored, and child processes inherit this."""
    code = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", code]


@pytest.fixture(scope="session")
def saved_by():
    """saved_by(f): (result of f(), {address: bytes} of the storages that autograd saves meanwhile)."""

    def saved_by(f) -> tuple:
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return f(), storages

    return saved_by


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of one small layer. Its vocabulary is the letters."""
    from small_bert import save_bert

    return save_bert(tmp_path_factory.mktemp("model"), max_position_embeddings=32, initializer_range=0.5)


@pytest.fixture(scope="session")
def kernels_of():
    """kernels_of(f): the kernels that f() would launch, one for each way in which a kernel is compiled. None runs."""
    if _device.INTERPRETING:
        pytest.skip("the interpreter compiles no kernels")
    from fastbert.emulator.driver import offline

    def kernels_of(f) -> set[tuple]:
        launches = []
        with offline("sm_90", launches.append, compiles=False):
            f()
        return {launch.variant for launch in launches}

    return kernels_of


@pytest.fixture
def waits(monkeypatch):
    """waits(f): the methods that read values on the host, in the order in which f() calls them. On a GPU each would
    wait for the device. (The methods are replaced, because `accelerate` would notice a mode of torch.)"""
    seen: list[str] = []
    # some checks read values on a CPU, but not on a GPU
    monkeypatch.setattr("fastbert.kernels._checks.can_look", lambda t: False)

    def counted(name: str):
        original = getattr(torch.Tensor, name)

        def call(tensor, *args, **kwargs):
            by_mask = any(isinstance(a, torch.Tensor) and a.dtype == torch.bool for a in args)
            to_host = any(isinstance(a, (str, torch.device)) and torch.device(a).type == "cpu" for a in args)
            if (name != "__getitem__" or by_mask) and (name != "to" or to_host):
                seen.append(name)
            return original(tensor, *args, **kwargs)

        return call

    names = "tolist item cpu to numpy nonzero argwhere masked_select unique equal allclose __getitem__ __bool__ __int__"

    def waits(f) -> list[str]:
        seen.clear()
        with monkeypatch.context() as patched:
            for name in [*names.split(), "__float__", "__index__"]:
                patched.setattr(torch.Tensor, name, counted(name))
            f()
        return list(seen)

    return waits


class Watch:
    """A clock that advances only by what its `sleep` is asked for, and by a microsecond at every reading."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def watch(monkeypatch) -> Watch:
    """Replaces the benchmark's clock, for rows that call `timing.time.sleep`: the machine's load does not matter."""
    from benchmarks.harness import timing

    watch = Watch()
    monkeypatch.setattr(timing, "time", watch)
    return watch


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch):
    """`torch.empty` is NaN (or a large integer) in tests, so an element that was never written is noticed."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def _seeded():
    """Fresh but repeatable random numbers in every test."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data that is not part of the repository: beside the repository, or one level higher."""
    root = Path(__file__).resolve().parent.parent
    for folder in (root.parent / "shared", root.parent.parent / "shared"):
        if folder.is_dir():
            return folder
    pytest.skip("needs the folder ../shared")
