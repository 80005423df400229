"""A fixed number of the fuzz's cases; tests/fuzz.py runs as long as one likes."""

from pathlib import Path

import pytest

import fuzz
from fastbert.kernels import native
from fastbert.kernels.cpu import library
from fastbert.kernels.cpu import operators as cpp

pytestmark = pytest.mark.native

CHUNKS, CASES = 12, 60


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_fuzz(chunk):
    wrong = [fuzz.run_case(number) for number in range(chunk * CASES, (chunk + 1) * CASES)]
    assert not any(wrong), "\n".join(filter(None, wrong))


# In order: large scores under torch's SDPA; large logits; a float64 weight for 8 bits; cu_seqlens of shape [1, 2];
# texts of one token with dropout; the gradient of a bias of two words, by chance 20 and 4 times as wrong as plain
# torch's; a layer, 13 and 5 times as wrong; x of shape [1, T, C], three times; float64 gradients that are differences
# of large numbers; a weight with strided rows, which torch multiplies in another order; a float16 tensor for a float64
# one; the gradients of pk and pq for one token, twice; delta of a rounded output, three times; a meta bias for 8-bit
# weights; x of shape [1, 0, C] for such weights
FOUND = (
    3_000_002_827, 24_000_000_541, 3_000_001_797, 3_000_002_350, 12_000_018_578, 11_000_000_254, 12_000_018_912,
    11_000_011_170, 12_000_003_731, 11_000_023_282, 12_000_016_775, 12_000_025_390,
    21_000_006_608, 22_000_002_206, 31_000_000_500, 31_000_003_123, 31_000_005_506,
    31_000_002_800, 31_000_004_872, 42_000_000_341, 42_000_000_208, 301_000_010_031, 7_000_000_314,
    77_000_006_207, 102_000_010_896, 77_000_019_071, 103_000_015_399,
    201_000_014_986, 202_000_006_736,
)  # fmt: skip


@pytest.mark.parametrize("number", FOUND)
def test_what_longer_runs_found(number):
    """Half of these were faults of the operators; in the others results and arguments are valid."""
    assert fuzz.run_case(number) is None


def test_the_fuzz_finds_faults(monkeypatch):
    """The first cases find slightly wrong numbers, and arguments that are not checked."""
    exact = native.pool
    monkeypatch.setattr(native, "pool", lambda *args: exact(*args) * 1.1)
    found = [wrong for wrong in map(fuzz.run_case, range(200)) if wrong]
    assert found
    assert all("pool" in wrong for wrong in found)
    monkeypatch.undo()

    monkeypatch.setattr(fuzz, "REFUSALS", ())
    assert any("a wrong argument raised" in wrong for wrong in map(fuzz.run_case, range(60)) if wrong)


class Calls:
    """A library that notes which of its functions are used."""

    def __init__(self, opened):
        self.opened, self.names = opened, set()

    def __getattr__(self, name):
        self.names.add(name.rpartition("_")[0])
        return getattr(self.opened, name)


@pytest.mark.once
@pytest.mark.skipif(cpp.load()[0] is None, reason=f"no C++ operators: {cpp.load()[1]}")
def test_every_function_of_the_library_is_reached(monkeypatch):
    """When six tensors each had another layout half of the time, the C++ hardly ever took them: two of 500 cases
    reached its attention, and six of its functions were never called."""
    calls = Calls(cpp.load()[0])
    monkeypatch.setattr(cpp, "load", lambda *_: (calls, None))
    header = Path(cpp.__file__).with_name(library.HEADER).read_text()
    python = "".join(path.read_text() for path in Path(cpp.__file__).parent.glob("*.py"))
    missing = {name for name in library.signatures(header) if f'"{name}"' in python}  # C++ calls others
    for number in range(1000):
        fuzz.run_case(number)
        missing -= calls.names
        if not missing:
            return
    pytest.fail(f"no case calls {sorted(missing)}")
