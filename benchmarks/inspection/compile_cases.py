"""The kernels to compile: the launches of a kernel module's calls, bound by Triton for a GPU that is not present."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """A kernel with the arguments of one launch. All values are plain, so that a worker process can receive a case."""

    name: str  # e.g. "attention_fwd[bf16,D=64]"
    kernel: str  # "module:name" of the @triton.jit function
    signature: dict[str, str]  # argument -> Triton type, e.g. "*bf16", "i32", "fp32", or "constexpr"
    constexprs: dict[str, Any]
    attrs: dict[str, list]  # argument -> what Triton assumes of it, e.g. [["tt.divisibility", 16]]
    options: dict[str, Any]  # options of the compiler
    wide_loads: bool = False  # must load 128 bits a lane at once (NVIDIA)
    fast: bool = False  # belongs to the fixed subset that continuous integration compiles

    @property
    def num_warps(self) -> int:
        return self.options["num_warps"]

    @property
    def bound(self) -> tuple:
        """All that determines the machine code: equal for two cases with the same code."""
        parts = (self.signature, self.constexprs, self.attrs, self.options)
        return (self.kernel, *(tuple((k, str(v)) for k, v in part.items()) for part in parts))

    @property
    def bulk_copy(self) -> bool:
        """Whether the code must contain bulk copies, if the architecture has them: an argument is a tensor
        descriptor."""
        return any(kind.startswith("tensordesc") for kind in self.signature.values())


def case_of(launch: Any, name: str, wide_loads: bool = False, fast: bool = False) -> CompileCase:
    """The case of an `emulator.driver.Launch`. name: the call's name, which is added to the kernel's."""
    kernel = launch.kernel
    short = launch.name.removeprefix("_").removesuffix("_kernel")
    return CompileCase(
        f"{short}[{name}]", f"{kernel.fn.__module__}:{kernel.fn.__name__}", launch.signature, launch.constexprs,
        launch.attrs, launch.options, wide_loads, fast,
    )  # fmt: skip


def cases_of(module: str, arch: str, fast: bool = False) -> tuple[list[CompileCase], dict[str, Exception]]:
    """(kernels that the module's `compile_calls()` launch on `arch`, each variant once, under its first name; name of a
    call -> its error, for calls that raised).

    A call that Triton or the operator refuses here would be refused on a GPU too. fast: only the calls that are marked
    as fast, with gradients.
    """
    from fastbert.emulator.driver import Launch, offline

    cases: dict[tuple, CompileCase] = {}
    errors: dict[str, Exception] = {}
    seen: list[Launch] = []
    with offline(arch, seen.append, compiles=False):
        for call in importlib.import_module(module).compile_calls():
            if fast and not call.fast:
                continue
            seen.clear()
            try:
                (replace(call, inference=False) if fast else call).run()
            except Exception as error:  # a refused launch must not stop the others
                errors[f"{call.function.__name__}[{call.name}]"] = error
            for launch in seen:
                case = case_of(launch, call.name, launch.kernel in call.wide_loads, call.fast)
                cases.setdefault(case.bound, case)
    return _with_own_names(cases.values()), errors


def _with_own_names(cases: Iterable[CompileCase]) -> list[CompileCase]:
    """Numbers cases with equal names, such as a forward pass without and with gradients."""
    counts: dict[str, int] = {}
    named = []
    for case in cases:
        counts[case.name] = counts.get(case.name, 0) + 1
        named.append(case if counts[case.name] == 1 else replace(case, name=f"{case.name}#{counts[case.name]}"))
    return named
