"""One of several processes that train on shares of one batch: `python -m benchmarks.harness.child_parallel < JOB`.

torch's DistributedDataParallel, over gloo between processes of a CPU and NCCL between GPUs, one process each. The job:
rank, world, store (a file by which they meet), folder (the model), tensors (this rank's share), engine, device, dtype,
threads, steps, out. Says "done" with the seconds of each step, from a barrier to a barrier.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from .child import first_layer_gradient
from .child_tools import say


def main() -> None:
    job = json.loads(sys.stdin.readline())
    import torch
    import torch.distributed as dist
    from transformers import BertForMaskedLM

    torch.set_num_threads(job["threads"])
    cuda = job["device"] == "cuda"
    device = torch.device("cuda", job["rank"]) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=f"file://{job['store']}", rank=job["rank"], world_size=job["world"]
    )
    model = BertForMaskedLM.from_pretrained(job["folder"], dtype=getattr(torch, job["dtype"])).to(device).train()
    if job["engine"] == "fastbert":
        from fastbert import accelerate

        accelerate(model)
    whole = model
    if job["world"] > 1:
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if cuda else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    batch = {name: torch.tensor(rows, device=device) for name, rows in job["tensors"].items()}

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()
        if job["world"] > 1:
            dist.barrier()

    seconds = []
    for _ in range(job["steps"] + 2):  # two to warm up
        wait()
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        optimizer.step()
        wait()
        seconds.append(time.perf_counter() - began)
    say("done", seconds=seconds[2:])
    np.save(job["out"], first_layer_gradient(whole))
    # Delete the wrapper before its group: deleting the group waits, with the GIL held, for a thread that needs the GIL.
    del model
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
