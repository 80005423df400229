"""One process, or several started by torchrun, which share a model by DDP or FSDP2 (with sharded parameters)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..encoding.encoder import resolve_device
from ..models.bert import BertLayer


@dataclass(frozen=True)
class Processes:
    """This process: its rank, the number of processes, and its device."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def join(cls, device: str = "auto") -> Processes:
        """Reads torchrun's environment variables and makes a process group (gloo on CPUs, NCCL on GPUs). Without the
        variables there is one process."""
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

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: Any) -> None:
        self.leave()

    def share(self, model: nn.Module, fsdp: bool) -> nn.Module:
        """The model wrapped so that its gradients are the mean over all processes."""
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
        """Sums x over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def in_turn(self, make: Callable[[], Any]) -> Any:
        """make(), first in the first process, then in the others, which find the files that the first one wrote.

        Raises: what make raised, in the first process; RuntimeError in the others.
        """
        if self.count == 1:
            return make()
        # Tokenising a large text may take hours, and the default group ends a process that waits for minutes. The group
        # is made before, because the processes wait for each other there too.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        failed = made = None
        if self.rank == 0:
            try:
                made = make()
            except Exception as error:
                failed = error
        # All processes learn whether the first one failed, so that none waits for it.
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, failed is not None, group=group)
        dist.destroy_process_group(group)
        if values[0]:
            raise failed or RuntimeError("the first process failed, and its message says why")
        return made if self.rank == 0 else make()

    def wait(self) -> None:
        """Waits until all processes have called this."""
        if self.count > 1:
            dist.barrier()
