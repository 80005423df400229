"""OpenVINO on a CPU."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..harness.peer import CPU_ONLY, EncoderPeer, Missing, ProcessPeer, Run, SentencePeer, need
from . import sentence_transformers

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fastbert.testing import ModelShape

    from ..harness.jobs import Job

PEER = "openvino"
PRECISION = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
THROUGHPUT, LATENCY = "THROUGHPUT", "LATENCY"


@functools.cache
def graph_file(shape: ModelShape, positions: int, pooled: bool) -> Path:
    """The plain model as OpenVINO's graph, with or without the mean over tokens; exported once for each model."""
    from ..harness.jobs import example, scratch_folder
    from ..harness.plain_bert import PlainBert, PlainMeanBert

    ov = need(PEER)
    bert, inputs = example(shape, positions, PlainMeanBert if pooled else PlainBert)
    path = Path(tempfile.mkdtemp(dir=scratch_folder())) / "model.xml"
    ov.save_model(ov.convert_model(bert, example_input=inputs), path, compress_to_fp16=False)
    return path


def compiled(graph: Any, dtype: str, threads: int, hint: str, cache: str | None = None) -> Any:
    """The compiled graph, a file or an OpenVINO model. hint: OpenVINO's performance hint, which arranges its
    threads."""
    core = need(PEER).Core()
    if cache is not None:
        core.set_property({"CACHE_DIR": cache})
    settings = {
        "PERFORMANCE_HINT": hint,
        "INFERENCE_PRECISION_HINT": PRECISION[dtype],
        "INFERENCE_NUM_THREADS": threads,
    }
    return core.compile_model(graph, "CPU", settings)


def run_queue(model: Any, requests: int, batches: Iterable[tuple[Sequence[int], Sequence[Any]]], into: np.ndarray):
    """Computes pooled vectors of batches, (rows, [input_ids, attention_mask]) each, and writes them to these rows of
    `into`. requests: how many run at once; 0: the model's optimal number."""
    queue = need(PEER).AsyncInferQueue(model, requests)
    names = [port.get_any_name() for port in model.inputs]
    queue.set_callback(lambda request, rows: into.__setitem__(rows, request.get_output_tensor(0).data))
    for rows, arrays in batches:
        queue.start_async(dict(zip(names, arrays, strict=True)), rows)
    queue.wait_all()


def encoder(size: int) -> Callable[[Job], Run]:
    """For many batches the throughput hint, which divides the threads into streams, and OpenVINO's optimal number of
    requests. For few batches, which would leave streams idle, the latency hint: all threads compute one request.

    The mean over tokens is part of the graph, because torch's threads beside OpenVINO's would slow it down.
    """

    def make(job: Job) -> Run:
        import torch

        from ..harness.jobs import groups
        from ..harness.workloads import padded

        need(PEER)
        if job.device.type != "cpu":
            raise Missing("measured on CPUs only")
        count = -(-len(job.rows) // size)

        def with_hint(hint: str) -> Any:
            file = graph_file(*job.exported_as, pooled=True)
            return job.once(hint, lambda: compiled(file, job.dtype_name, torch.get_num_threads(), hint))

        flight = 1
        if count > 1:
            flight = with_hint(THROUGHPUT).get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        model = with_hint(THROUGHPUT if flight > 1 and count >= 3 * flight else LATENCY)

        def batches() -> Iterable[tuple[list[int], list[np.ndarray]]]:
            for group in groups(job, size, True):
                yield group, [t.numpy() for t in padded([job.rows[n] for n in group], job.device)]

        def run() -> Tensor:
            vectors = torch.empty(len(job.rows), job.workload.model.hidden, dtype=torch.float32, device="cpu")
            run_queue(model, flight if count >= 3 * flight else 1, batches(), vectors.numpy())
            return vectors

        return run

    return make


def _sentences(folder: Path, texts: list[str], size: int, device: Any, dtype: Any) -> Run:
    need("optimum-intel", "optimum.intel")
    kept = sentence_transformers.exported(folder, "openvino", "optimum-intel openvino")
    name = str(dtype).removeprefix("torch.")
    if name == "float16":
        raise Missing("OpenVINO is measured in float32 and bfloat16: a float16 hint may run as bfloat16")
    options = {"ov_config": {"INFERENCE_PRECISION_HINT": PRECISION[name]}}
    model = sentence_transformers.model(kept, device, backend="openvino", model_kwargs=options)
    return sentence_transformers.encode(model, texts, size)


def in_process(job: dict[str, Any]) -> Callable[[list[list[int]]], np.ndarray]:
    need(PEER)

    from ..harness.child_tools import in_batches, say

    say("imported")
    model = compiled(job["file"], job["dtype"], job["threads"], LATENCY, job.get("cache"))
    return in_batches(lambda ids, mask: next(iter(model((ids, mask)).values())), job["batch"])


def _file(files: Any) -> dict[str, Any]:
    return {"file": str(graph_file(*files.job.exported_as, pooled=False))}


ENCODERS = (EncoderPeer("openvino", PEER, encoder, CPU_ONLY, sizes=(2, 4, 1, 8), fits=True),)
PROCESSES = (
    ProcessPeer("openvino, empty cache", PEER, __name__, _file, CPU_ONLY, suites=("cold",)),
    ProcessPeer("openvino", PEER, __name__, _file, CPU_ONLY, cache=lambda folder: {"cache": folder}),
)
SENTENCES = (SentencePeer("OpenVINO backend", PEER, _sentences, PEER, devices=CPU_ONLY),)
