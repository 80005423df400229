"""A Triton driver without a GPU: the operators run on CPU tensors through Triton's real launch path.

    with offline("sm_90", on_launch=show):
        F.attention(q, k, v, cu_seqlens, max_seqlen, impl="triton")     # CPU tensors; show(launch) at every launch

Triton binds the arguments, specialises on their types, sizes and alignment, looks up or compiles the kernel and packs
the arguments as for a real GPU of that architecture. The launch then goes to `on_launch`, as a `Launch`; without
`on_launch` nothing runs, and the outputs keep their initial contents.

    compiles=True    kernels are compiled for the GPU (seconds each, kept in Triton's cache): `launch.compiled` has the
                     PTX and the machine code, `launch.shared` the shared memory. A kernel that needs more than the
                     GPU has raises Triton's OutOfResources, as on the GPU.
    compiles=False   nothing is compiled: `launch.compiled` is None. Without `on_launch` the arguments are not even
                     inspected, so that a call costs only its Python.

Triton decides at import whether it interprets kernels, so neither mode works if TRITON_INTERPRET is set. Only one
driver is active in a process at a time. Kernels are bound separately for each architecture and value of `compiles`, and
stay bound for the next use of the same pair.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as _triton_driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ..functional import machine

KB = 1024
# name -> (Triton's backend, architecture, warp size; most shared memory of a program)
CARDS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KB),
    "sm_86": (GPUTarget("cuda", 86, 32), 99 * KB),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * KB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KB),
    "sm_103": (GPUTarget("cuda", 103, 32), 227 * KB),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * KB),
    "sm_121": (GPUTarget("cuda", 121, 32), 99 * KB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KB),
}
MULTIPROCESSORS = 4  # few, so that persistent grids loop


@dataclass(frozen=True)
class Launch:
    """A launch, as it would be sent to the GPU.

    arguments: run-time argument -> (Triton type, value), in the kernel's order: ("*bf16", tensor), ("i32", number),
        ("fp32", number), ("tensordesc<...>", descriptor with base, shape, strides, block_shape). Compile-time constants
        are in `constexprs`, including None and the number 1 where Triton specialises on them.
    attrs: Triton's assumptions about run-time arguments, e.g. {"x_ptr": [["tt.divisibility", 16]]}.
    """

    name: str
    kernel: JITFunction
    compiled: Any  # triton's CompiledKernel, or None
    grid: tuple[int, int, int]
    arguments: dict[str, tuple[str, Any]]
    signature: dict[str, str]  # argument -> Triton type, or "constexpr"
    constexprs: dict[str, Any]
    attrs: dict[str, list]
    options: dict[str, Any]  # of the compiler
    descriptors: list[dict]  # if compiled: the compiler's data about the copies of each tensor descriptor
    source: Any = None  # Triton's source object; with `options` it determines the entry in Triton's cache

    @property
    def num_warps(self) -> int:
        return self.options["num_warps"]

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a program; 0 where not compiled."""
        return 0 if self.compiled is None else self.compiled.metadata.shared

    @property
    def divisible(self) -> frozenset[str]:
        """Run-time arguments that were assumed to be divisible by 16."""
        return frozenset(n for n, attrs in self.attrs.items() if ["tt.divisibility", 16] in [list(a) for a in attrs])

    @property
    def variant(self) -> tuple:
        """Launches with the same variant run the same compiled kernel."""
        parts = (self.signature, self.constexprs, self.attrs, self.options)
        return (self.name, *(tuple((k, str(v)) for k, v in part.items()) for part in parts))


@contextlib.contextmanager
def offline(
    arch: str, on_launch: Callable[[Launch], None] | None = None, compiles: bool = True
) -> Iterator[OfflineDriver]:
    """Inside the block Triton's kernels are launched on the card `arch` (a name in CARDS) and run by `on_launch`.

    Raises: ValueError on an unknown architecture; RuntimeError where TRITON_INTERPRET is set.
    """
    driver = OfflineDriver(arch, on_launch, compiles)
    before = _triton_driver._active, machine.stand_in(driver.card)
    try:
        _triton_driver.set_active(driver)
        yield driver
    finally:
        _triton_driver.set_active(before[0])
        machine.stand_in(before[1])


def activate(arch: str, on_launch: Callable[[Launch], None] | None = None, compiles: bool = True) -> OfflineDriver:
    """`offline` for the rest of the process."""
    driver = OfflineDriver(arch, on_launch, compiles)
    machine.stand_in(driver.card)
    _triton_driver.set_active(driver)
    return driver


class OfflineDriver:
    """The interface that Triton needs from a driver, for a GPU that is not there."""

    def __init__(self, arch: str, on_launch: Callable[[Launch], None] | None, compiles: bool):
        if arch not in CARDS:
            raise ValueError(f"arch must be one of {', '.join(CARDS)}, got {arch!r}")
        if machine.INTERPRETING:
            raise RuntimeError("under TRITON_INTERPRET kernels are not compiled: start the process without it")
        self.arch, self.on_launch, self.compiles = arch, on_launch, compiles
        self._target, max_shared = CARDS[arch]
        number = 94 if self._target.backend == "hip" else self._target.arch  # of the MI300, as torch gives it
        self.card = machine.Card(arch, divmod(number, 10), MULTIPROCESSORS)
        # Triton caches bound kernels under this key, which must differ from a real GPU's key, a number from 0.
        self._device = arch if compiles else f"{arch}, not compiled" if on_launch else f"{arch}, nothing launched"
        self.utils = _Utils(self._target, max_shared)
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return False  # Triton must not select this driver by itself

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Callable:
        raise NotImplementedError("nothing can be timed without a card")

    def get_current_device(self) -> str:
        return self._device

    def set_current_device(self, device: str) -> None:
        pass

    def get_current_stream(self, device: str) -> int:
        return 0


class _Utils:
    def __init__(self, target: GPUTarget, max_shared: int):
        self._properties = {
            "max_shared_mem": max_shared, "max_num_regs": 65536, "multiprocessor_count": MULTIPROCESSORS,
            "warpSize": target.warp_size, "sm_clock_rate": 0, "mem_clock_rate": 0, "mem_bus_width": 0,
        }  # fmt: skip

    def get_device_properties(self, device: str) -> dict[str, int]:
        return self._properties

    def load_binary(self, name: str, kernel: bytes, shared: int, device: str) -> tuple:
        return object(), object(), 0, 0, 1024  # module, function, registers, spills, threads a program may have

    def unload_module(self, module: object) -> None:
        pass


class _Launcher:
    """Replaces the driver's C function that packs arguments: called with the grid and all bound arguments."""

    def __init__(self, src: Any, metadata: Any):
        names, self._src = src.fn.arg_names, src
        self._signature = {name: src.signature[name] for name in names}
        by_name = lambda paths: {names[path[0]]: value for path, value in paths.items()}  # noqa: E731
        self._constexprs, self._attrs = by_name(src.constants), {n: a for n, a in by_name(src.attrs).items() if a}
        self._run_time = [(n, name) for n, name in enumerate(names) if self._signature[name] != "constexpr"]
        self._descriptors = list(getattr(metadata, "tensordesc_meta", None) or [])
        self._options = src.bound_options

    def __call__(self, grid_x, grid_y, grid_z, stream, function, packed, metadata, enter, exit_, *args) -> None:
        if len(args) != len(self._signature):
            raise TypeError(f"{self._src.fn.__name__} takes {len(self._signature)} arguments, got {len(args)}")
        arguments = {}
        for n, name in self._run_time:
            kind, value = self._signature[name], args[n]
            _expect_packable(self._src.fn.__name__, name, kind, value, self._attrs.get(name, ()))
            arguments[name] = (kind, value)
        on_launch = getattr(_triton_driver.active, "on_launch", None)
        if enter is not None:
            enter(metadata)
        if on_launch is not None:
            on_launch(
                Launch(
                    self._src.fn.__name__, self._src.fn, self._src.compiled, (grid_x, grid_y, grid_z), arguments,
                    self._signature, self._constexprs, self._attrs, self._options, self._descriptors, self._src,
                )
            )  # fmt: skip
        if exit_ is not None:
            exit_(metadata)


def _launch_nothing(*args: Any) -> None:
    pass


INT_BITS = {"i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "u1": 1, "u8": 8, "u16": 16, "u32": 32, "u64": 64}


def _expect_packable(kernel: str, name: str, kind: str, value: Any, attrs: Any) -> None:
    """Raises TypeError or ValueError if a value does not fit the type that the kernel was compiled for."""
    divisible = any(list(attr) == ["tt.divisibility", 16] for attr in attrs)
    if kind.startswith("*"):
        if not isinstance(value, Tensor):
            raise TypeError(f"{kernel}: {name} is {kind}, got {type(value).__name__}")
        found, number = f"*{_type_name(value.dtype)}", value.data_ptr()
        if found != kind:
            raise TypeError(f"{kernel}: {name} was compiled as {kind}, got {found}")
    elif kind.startswith("tensordesc"):
        if not isinstance(value, TensorDescriptor):
            raise TypeError(f"{kernel}: {name} is {kind}, got {type(value).__name__}")
        return
    elif kind in INT_BITS:
        number = int(value)
        low, high = (0, 2 ** INT_BITS[kind]) if kind[0] == "u" else (-(2 ** (INT_BITS[kind] - 1)),) * 2
        high = high if kind[0] == "u" else -low
        if kind not in ("i1", "u1") and not low <= number < high:
            raise ValueError(f"{kernel}: {name} was compiled as {kind}, which cannot hold {number}")
    elif kind in ("fp16", "bf16", "fp32", "fp64", "f32"):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{kernel}: {name} is {kind}, got {type(value).__name__}")
        return
    else:
        raise TypeError(f"{kernel}: {name} has the unknown type {kind}")
    if divisible and number % 16 != 0:
        raise ValueError(f"{kernel}: {name} was compiled as divisible by 16, got {number}")


@functools.cache
def _type_name(dtype: torch.dtype) -> str:
    return triton.runtime.jit.type_canonicalisation_dict[str(dtype).split(".")[-1]]


# ---- compiling, or not -------------------------------------------------------------------------------------

_compile_for_a_card = JITFunction._do_compile


def _do_compile(self, key, signature, device, constexprs, options, attrs, warmup):
    """Replaces `JITFunction._do_compile`. Under an offline driver the bound data is kept beside the compiled kernel,
    or, without compiling, in place of one."""
    active = _triton_driver.active
    if not isinstance(active, OfflineDriver):
        return _compile_for_a_card(self, key, signature, device, constexprs, options, attrs, warmup)
    if active.compiles:
        compiled = _compile_for_a_card(self, key, signature, device, constexprs, options, attrs, warmup)
        compiled.src.bound_options, compiled.src.compiled = dict(options.__dict__), compiled
        return compiled
    src = self.ASTSource(self, signature, constexprs, attrs)
    src.bound_options, src.compiled = dict(options.__dict__), None
    kernel_cache = self.device_caches[device][0]
    run = _launch_nothing if active.on_launch is None else _Launcher(src, None)
    kernel_cache[key] = SimpleNamespace(
        src=src, function=None, packed_metadata=None, metadata=None, name=self.__name__, asm={},
        run=run, launch_metadata=lambda grid, stream, *args: None,
    )  # fmt: skip
    return kernel_cache[key]


JITFunction._do_compile = _do_compile
