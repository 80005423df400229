"""Every kernel with every flag, compiled and executed as PTX: what `make ptx-fast` runs for each architecture."""

import pytest

from emulated_subset import SUBSET

pytest.importorskip("triton", reason="tests the Triton kernels")

from fastbert.kernels import _device

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(_device.INTERPRETING, reason="the operators' own tests cover all of it in the interpreter"),
]


@pytest.mark.parametrize("name", SUBSET)
def test_within_budget(name):
    failed = [str(check) for check in SUBSET[name]() if not check.passed]
    assert not failed
