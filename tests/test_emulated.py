"""Every kernel at every flag, compiled, its PTX executed: what `make ptx-fast` runs, architecture by architecture."""

import pytest

from emulated_subset import SUBSET

pytest.importorskip("triton", reason="tests the Triton kernels")

from fastbert.kernels import _device

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(_device.INTERPRETING, reason="interpreted, the tests of each operator run all of it"),
]


@pytest.mark.parametrize("name", SUBSET)
def test_within_budget(name):
    failed = [str(check) for check in SUBSET[name]() if not check.passed]
    assert not failed
