"""The rules of the benchmarks of the server."""

import pytest

pytest.importorskip("numpy")
from benchmarks.suites.serving_soak import growth

pytestmark = pytest.mark.once
NOISE = [20 * (i * 0.618 % 1) for i in range(60)]


@pytest.mark.parametrize(
    ("megabytes", "wanted"),
    [
        ([450 + noise for noise in NOISE], 0.0),
        ([450 + noise for noise in NOISE[:-1]] + [520], 0.0),  # one moment with large texts
        ([min(200 + 30 * i, 450) for i in range(60)], 0.0),  # caches and workspaces fill at the start
        ([450 + 2 * i + noise for i, noise in enumerate(NOISE)], 0.12),
        ([450], 0.0),
        ([], 0.0),
    ],
    ids=["level", "a moment", "the start", "a leak", "one observation", "none"],
)
def test_growth_of_memory(megabytes, wanted):
    """A run was failed for its last observation, and for how a server's first minute is."""
    assert growth(megabytes) == pytest.approx(wanted, abs=0.01)
