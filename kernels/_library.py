"""One registration for every operator: schema, Triton launcher, shape function.

An operator is an opaque node to torch.compile and torch.export. Its launcher runs on CUDA tensors, and on CPU tensors
where Triton takes those (`_device.triton_on_cpu`). `Library` plus `autograd.Function` costs 5 to 7 us
a call where `torch.library.custom_op` costs 14 to 18, and a BERT pass makes some sixty calls.
"""

from collections.abc import Callable

import torch

from . import _device

# operator -> its launcher on CPU tensors, for who goes past torch's dispatcher
LAUNCHERS: dict[str, Callable] = {}
_LIBRARY = torch.library.Library("fastbert", "DEF")


def _on_its_device(launch: Callable) -> Callable:
    """`launch` with its tensors' device as the current one, which is where Triton launches."""

    def launch_there(*args):
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        if device.index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return launch_there


def _where_triton_takes_cpu_tensors(name: str, launch: Callable) -> Callable:
    def launch_on_cpu(*args):
        if not _device.triton_on_cpu():
            raise RuntimeError(f"fastbert::{name} needs CUDA tensors, or TRITON_INTERPRET=1 for tensors on a CPU")
        return launch(*args)

    return launch_on_cpu


def register(schema: str, launch: Callable, fake: Callable) -> Callable:
    """Define `fastbert::<schema>` and return its callable.

    `launch` allocates the outputs and launches the kernels; `fake` gives outputs of the right shape, dtype and
    strides for tracing.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _on_its_device(launch), "CUDA")
    LAUNCHERS[name] = _where_triton_takes_cpu_tensors(name, launch)
    _LIBRARY.impl(name, LAUNCHERS[name], "CPU")
    torch.library.register_fake(f"fastbert::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastbert, name).default
