"""Runs a few lines of PTX on the emulator, without a compiler or a card."""

import numpy as np
import pytest

from fastbert.emulator.execute import run
from fastbert.emulator.memory import pointer
from fastbert.emulator.region import Region

_BITS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}  # the type of a register for an element of so many bytes


class Ptx:
    """Runs the body of a kernel whose tensors are numpy arrays and whose other arguments are 32-bit numbers.

    In the body `%NAME` is a pointer to the tensor NAME or the number NAME, `%t` the thread, `smem` shared memory; `%p`,
    `%h`, `%r` and `%d`, each with a number from 0, are free predicates and registers of 16, 32 and 64 bits.
    """

    def text(self, body: str, tensors, numbers, threads: int) -> str:
        names = [*tensors, *numbers]
        kinds = ["b64"] * len(tensors) + ["b32"] * len(numbers)
        parameters = ",\n".join(f".param .{kind} p_{name}" for name, kind in zip(names, kinds, strict=True))
        loads = "\n".join(
            f".reg .{kind} %{name}; ld.param.{kind} %{name}, [p_{name}];"
            for name, kind in zip(names, kinds, strict=True)
        )
        return f"""
            .version 8.7
            .target sm_90a
            .address_size 64
            .extern .shared .align 128 .b8 smem[];
            .visible .entry example({parameters})
            .reqntid {threads}
            {{
            .reg .pred %p<20>; .reg .b16 %h<40>; .reg .b32 %r<160>; .reg .b64 %d<40>; .reg .b32 %t;
            mov.u32 %t, %tid.x;
            {loads}
            {body}
            ret;
            }}
            """

    def __call__(self, body: str, threads: int = 32, grid=(1, 1, 1), shared: int = 0, descriptors=None, **arguments):
        """Writes the tensors in place, and returns the number of instructions that warps ran."""
        tensors = {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}
        numbers = {name: value for name, value in arguments.items() if name not in tensors}
        regions = [Region(name, t.ctypes.data, t.ctypes.data + t.nbytes) for name, t in tensors.items()]
        parameters = [pointer(n, region.start) for n, region in enumerate(regions)]
        parameters += [np.uint32(int(value) & 0xFFFFFFFF) for value in numbers.values()]
        text = self.text(body, tensors, numbers, threads)
        return run(text, grid, parameters, regions, shared, descriptors)

    @staticmethod
    def position(name: str, tensors: list[str], numbers: list[str]) -> int:
        """The index of an argument among the parameters. Tensors come before numbers."""
        return [*tensors, *numbers].index(name)

    def each(self, body: str, *inputs: np.ndarray, out) -> np.ndarray:
        """Runs one thread for each element: `body` computes `%out` of the dtype `out` from `%in0`, `%in1` and so on."""
        threads = -(-len(inputs[0]) // 32) * 32
        result = np.zeros(threads, out)
        arguments, loads = {}, []
        for n, values in enumerate(inputs):
            padded = np.zeros(threads, values.dtype)
            padded[: len(values)] = values
            arguments[f"x{n}"] = padded
            loads.append(_element(f"x{n}", f"%in{n}", values.itemsize, load=True))
        store = _element("y", "%out", result.itemsize, load=False)
        register = f".reg .{_BITS[result.itemsize]} %out;"
        self("\n".join([*loads, register, body, store]), threads=threads, **arguments, y=result)
        return result[: len(inputs[0])]


def _element(tensor: str, register: str, size: int, load: bool) -> str:
    """Load or store the element of this thread."""
    address = f".reg .b64 %at_{tensor}; mad.wide.u32 %at_{tensor}, %t, {size}, %{tensor};"
    if load:
        return f"{address} .reg .{_BITS[size]} {register}; ld.global.b{8 * size} {register}, [%at_{tensor}];"
    return f"{address} st.global.b{8 * size} [%at_{tensor}], {register};"


@pytest.fixture(scope="session")
def ptx() -> Ptx:
    return Ptx()
