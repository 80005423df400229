"""One process or several of torchrun's, and the model as they share it: DDP, or FSDP2 with its parameters sharded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..encoding.encoder import resolve_device
from ..models.bert import BertLayer


@dataclass(frozen=True)
class Processes:
    """This process among others: its number, how many there are, and its device."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def join(cls, device: str = "auto") -> Processes:
        """From torchrun's variables, with a process group (gloo on CPUs, NCCL on GPUs); without them, alone."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls(0, 1, resolve_device(device))
        found = resolve_device(device)
        if found.type == "cuda":
            found = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(found)
        dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
        return cls(dist.get_rank(), count, found)

    def leave(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()

    def share(self, model: nn.Module, fsdp: bool) -> nn.Module:
        """The model whose gradients are the mean over all processes."""
        if self.count == 1:
            return model
        if fsdp:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.count,))
            for layer in [module for module in model.modules() if isinstance(module, BertLayer)]:
                fully_shard(layer, mesh=mesh)
            return fully_shard(model, mesh=mesh)
        return nn.parallel.DistributedDataParallel(model)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their numbers."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """For all others to come here."""
        if self.count > 1:
            dist.barrier()
