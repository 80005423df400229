"""Whole encoders by everybody: lists of token ids in, one mean-pooled vector each out, on the CPU, in the order given.

All start from the same weights and the same ids, and each pays for its own sorting, padding or packing. Tokenising is
nobody's here.
"""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor

from fastbert import functional as F
from fastbert.batching import even_batches, run_batches
from fastbert.embed import Encoder
from fastbert.kernels import _prepack
from fastbert.models.bert import BertModel
from fastbert.packing import PackedBatch
from fastbert.testing import ModelShape

from ..harness.case import OURS, Missing, Row, Run, need
from ..harness.jobs import Job, groups, padded_run, weights
from ..harness.plain_bert import PlainBert, PlainMeanBert
from ..harness.workloads import padded, token_ids
from . import packed as peers_packed
from .packed import their_model

# ---- ours, and the floor ---------------------------------------------------------------------------------


def _model(job: Job) -> BertModel:
    def make() -> BertModel:
        config, state = job.model
        model = BertModel(config, add_pooling_layer=False)
        model.load_state_dict(state)
        return model.to(job.device, job.dtype).eval()

    return job.once("fastbert", make)


def _encoder(job: Job) -> Encoder:
    """Without a tokeniser, since it is given ids."""
    return Encoder(_model(job), SimpleNamespace(model_max_length=None))


def _fastbert(job: Job) -> Run:
    encoder = _encoder(job)
    return lambda: encoder.encode_ids(job.rows, encoder.token_budget())


def _graph(job: Job) -> Run:
    """One batch, packed beforehand, through the model's own recordings."""
    model = copy.copy(_model(job)).use_cuda_graphs()  # the same weights; the other's launches are its own
    batch = PackedBatch.from_lists(job.rows, device=job.device)

    @torch.inference_mode()
    def run() -> Tensor:
        return F.pool(model(batch).last_hidden_state, batch.cu_seqlens).float().cpu()

    return run


def _floor(job: Job) -> Run:
    """The model's own matrix products on the real tokens through the vendor's library, and nothing else: in the batches
    that an Encoder makes, as many at once, and on a CPU from weights that the library laid out beforehand."""
    config, state = job.model
    names = (
        "attention.self.query", "attention.self.key", "attention.self.value",
        "attention.output.dense", "intermediate.dense", "output.dense",
    )  # fmt: skip
    layers = []
    for n in range(config.num_hidden_layers):
        of_layer = (state[f"encoder.layer.{n}.{name}.weight"] for name in names)
        q, k, v, *rest = (weight.to(job.device, job.dtype, copy=True) for weight in of_layer)
        layers.append([torch.cat((q, k, v)), *rest])
        for weight in layers[-1]:
            _prepack.mark(weight)
    lengths = [len(row) for row in job.rows]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batches = even_batches(order, lengths, _encoder(job).token_budget(), job.device)
    tokens = [sum(lengths[n] for n in rows) for rows in batches]
    inputs = [torch.randn(t, config.hidden_size, device=job.device).to(job.dtype) for t in tokens]

    def product(x: Tensor, weight: Tensor) -> Tensor:
        packed = _prepack.find(x, weight, None)
        return tf.linear(x, weight) if packed is None else _prepack.linear(x, packed, None)

    @torch.inference_mode()  # a thread's own switch
    def multiply(batch: list[int]) -> None:
        x = inputs[batch[0]]
        for qkv, out, up, down in layers:
            product(x, qkv)
            product(product(product(x, out), up), down)

    def run() -> Tensor:
        run_batches(multiply, [[n] for n in range(len(inputs))], job.device)
        return inputs[-1]

    return run


# ---- others ----------------------------------------------------------------------------------------------


def _transformers(attention: str, size: int, by_length: bool, mode: str | None = None):
    def make(job: Job) -> Run:
        if attention == "flex_attention" and job.device.type != "cuda":
            raise Missing("flex attention is compiled for GPUs")
        model = their_model(job, attention)
        call = model
        if mode is not None:  # on a CPU with weights frozen, as its documentation advises for inference
            options = torch._inductor.list_mode_options(mode) | {"freezing": job.device.type == "cpu"}
            call = torch.compile(model, dynamic=len(job.rows) > 1, options=options)
        return padded_run(
            lambda ids, mask: call(input_ids=ids, attention_mask=mask).last_hidden_state, job, size, by_length
        )

    return make


def _plain(size: int, mode: str | None = None):
    """BERT in plain torch, which every machine has that has torch."""

    def make(job: Job) -> Run:
        model = job.once("plain torch", lambda: job.plain(job.dtype))
        if mode is not None:
            options = torch._inductor.list_mode_options(mode)
            model = torch.compile(model, dynamic=len(job.rows) > 1, options=options)
        return padded_run(model, job, size, True)

    return make


# ---- runtimes of ONNX and OpenVINO graphs ----------------------------------------------------------------
# A graph is exported once a model and run, whatever the batches; a session or compiled model once a case.


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    """Goes away with the process."""
    return tempfile.TemporaryDirectory(prefix="fastbert-bench-")


def _example(
    shape: ModelShape, positions: int, kind: type[PlainBert] = PlainBert
) -> tuple[torch.nn.Module, tuple[Tensor, Tensor]]:
    """The plain model in float32, and two sequences to trace it with."""
    config, state = weights(shape, positions)
    bert = kind(state, config.num_hidden_layers, config.num_attention_heads, config.layer_norm_eps).eval()
    return bert, padded(token_ids((7, 5), shape.vocab), torch.device("cpu"))


def _export(job: Job, make: Callable[[ModelShape, int], Path]) -> Path:
    return make(job.workload.model, job.model[0].max_position_embeddings)


@functools.cache
def _fused(shape: ModelShape, positions: int) -> Path:
    """Exported with dynamic sizes, then fused for BERT by the optimiser that ONNX Runtime brings along."""
    need("onnx")
    optimizer = need("onnxruntime", "onnxruntime.transformers.optimizer")
    folder = Path(tempfile.mkdtemp(dir=_folder().name))
    bert, example = _example(shape, positions)
    path = _onnx_file(bert, example, folder / "plain.onnx")
    optimizer.optimize_model(str(path), "bert", shape.heads, shape.hidden).save_model_to_file(
        str(folder / "fused.onnx")
    )
    path.unlink()
    return folder / "fused.onnx"


@functools.cache
def _quantised(shape: ModelShape, positions: int) -> Path:
    """Weights in int8, activations to int8 as they come (`quantize_dynamic`)."""
    fused = _fused(shape, positions)
    need("onnxruntime", "onnxruntime.quantization").quantize_dynamic(
        str(fused), str(fused.with_name("int8.onnx")),
        extra_options={"DefaultTensorType": 1},  # 1: float, where it cannot infer
    )  # fmt: skip
    return fused.with_name("int8.onnx")


@functools.cache
def _openvino_file(shape: ModelShape, positions: int, kind: type[PlainBert] = PlainBert) -> Path:
    ov = need("openvino")
    bert, example = _example(shape, positions, kind)
    path = Path(tempfile.mkdtemp(dir=_folder().name)) / "model.xml"
    ov.save_model(ov.convert_model(bert, example_input=example), path, compress_to_fp16=False)
    return path


def _onnx_file(bert: torch.nn.Module, example: tuple[Tensor, Tensor], path: Path) -> Path:
    """The model as ONNX, with dynamic sizes."""
    names, sizes = ("input_ids", "attention_mask", "hidden"), {0: "batch", 1: "length"}
    torch.onnx.export(
        bert, example, str(path), dynamo=False, input_names=names[:2], output_names=names[2:],
        dynamic_axes=dict.fromkeys(names, sizes), opset_version=17,
    )  # fmt: skip
    return path


def _only_cpu(job: Job) -> None:
    if job.device.type != "cpu":
        raise Missing("measured on CPUs only")


def _onnxruntime(file: Callable[[ModelShape, int], Path], size: int):
    """All threads to one batch, which is ONNX Runtime's default; the spinning of its idle threads too."""

    def make(job: Job) -> Run:
        ort = need("onnxruntime")
        _only_cpu(job)

        def session() -> Any:
            options = ort.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            return ort.InferenceSession(str(_export(job, file)), options, providers=["CPUExecutionProvider"])

        run = job.once(file, session).run

        def call(ids: Tensor, mask: Tensor) -> Tensor:
            return torch.from_numpy(run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])

        return padded_run(call, job, size, True)

    return make


def _openvino(size: int):
    """Many batches: its throughput hint, which splits the threads into streams, and as many requests as it asks for.

    Few batches, which could not keep the streams busy to the end: its latency hint, all threads to one request.
    The mean over tokens is part of its graph: torch's threads beside its own would slow it down.
    """
    file = functools.partial(_openvino_file, kind=PlainMeanBert)

    def make(job: Job) -> Run:
        ov = need("openvino")
        _only_cpu(job)
        precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[job.dtype]
        batches = -(-len(job.rows) // size)

        def compiled(hint: str) -> Any:
            settings = {
                "PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": precision,
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            }  # fmt: skip
            return job.once(hint, lambda: ov.Core().compile_model(_export(job, file), "CPU", settings))

        flight = 1
        if batches > 1:
            flight = compiled("THROUGHPUT").get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        model = compiled("THROUGHPUT" if flight > 1 and batches >= 3 * flight else "LATENCY")
        queue = ov.AsyncInferQueue(model, flight if batches >= 3 * flight else 1)
        names = [port.get_any_name() for port in model.inputs]

        def run() -> Tensor:
            vectors = torch.empty(len(job.rows), job.workload.model.hidden)

            into = vectors.numpy()
            queue.set_callback(lambda request, group: into.__setitem__(group, request.get_output_tensor(0).data))
            for group in groups(job, size, True):
                ids, mask = padded([job.rows[n] for n in group], job.device)
                queue.start_async(dict(zip(names, (ids.numpy(), mask.numpy()), strict=True)), group)
            queue.wait_all()
            return vectors

        return run

    return make


# ---- the table -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderPeer:
    row: str
    peer: str
    make: Callable[[Job], Run]
    devices: tuple[str, ...] = ("cpu", "cuda")
    package: str | None = None
    slow: bool = False
    checked: bool = True
    dtypes: Sequence[torch.dtype] | None = None  # computes in these only; None: in the case's
    single: bool = True  # makes sense for one query too
    many: bool = True  # makes sense for many texts
    tolerance: float | None = None


CPU_ONLY, GPU_ONLY = ("cpu",), ("cuda",)
FLOOR = "matrix products alone"
INT8 = 0.1  # relative RMS error that eight bits are allowed: no budget of a floating-point dtype could be kept


def _sizes(label: str, peer: str, make: Callable[[int], Callable[[Job], Run]], sizes: Sequence[int], **more: Any):
    """A row for each size of sorted batches; the first, thought the best, also for --quick and for one query."""
    first = sizes[0]
    return [
        EncoderPeer(f"{label}, sorted, batches of {n}", peer, make(n), **{"slow": n != first, **more},
                    single=n == first)
        for n in sizes
    ]  # fmt: skip


def _sdpa(n: int) -> Callable[[Job], Run]:
    return _transformers("sdpa", n, True)


PEERS = (
    EncoderPeer("fastbert", OURS, _fastbert),
    EncoderPeer("fastbert, CUDA graph", OURS, _graph, GPU_ONLY, many=False),
    EncoderPeer(FLOOR, "floor", _floor, checked=False, package="torch"),
    # On a CPU small batches win: little padding, and the activations stay in its cache. Which is best depends on the
    # lengths, so several sizes are measured. 32 is what sentence-transformers takes unless told otherwise.
    *_sizes("transformers sdpa", "transformers", _sdpa, (2, 4, 8), devices=CPU_ONLY),
    *_sizes("openvino", "openvino", _openvino, (2, 4, 1, 8), devices=CPU_ONLY),
    *_sizes("onnxruntime fp32", "onnxruntime", lambda n: _onnxruntime(_fused, n), (2, 4), devices=CPU_ONLY,
            dtypes=(torch.float32,)),
    *_sizes(f"onnxruntime int8 (tolerance {INT8:.0%})", "onnxruntime", lambda n: _onnxruntime(_quantised, n), (2, 4),
            devices=CPU_ONLY, tolerance=INT8, slow=True),
    *_sizes("transformers sdpa", "transformers", _sdpa, (32, 128), devices=GPU_ONLY, slow=False),
    EncoderPeer("sentence-transformers unpadded, sorted, batches of 32", "sentence-transformers",
                peers_packed.sentence_transformers(32), GPU_ONLY, single=False),
    EncoderPeer("sentence-transformers unpadded, sorted, batches of 128", "sentence-transformers",
                peers_packed.sentence_transformers(128), GPU_ONLY),
    EncoderPeer("flash-attn BERT, packed, sorted, batches of 128", "flash-attn", peers_packed.flash_attn_bert(128),
                GPU_ONLY),
    EncoderPeer("nn.TransformerEncoder nested, sorted, batches of 32", "torch", peers_packed.nested(32), single=False),
    EncoderPeer("plain torch sdpa, sorted, batches of 32", "torch", _plain(32), GPU_ONLY),
    EncoderPeer("torch.compile, plain torch sdpa, sorted, batches of 32", "torch.compile", _plain(32, "default"),
                GPU_ONLY, package="torch", slow=True),
    EncoderPeer("transformers flex, sorted, batches of 32", "transformers", _transformers("flex_attention", 32, True),
                GPU_ONLY),
    EncoderPeer("transformers sdpa, sorted, batches of 32", "transformers", _sdpa(32), CPU_ONLY, single=False,
                slow=True),
    EncoderPeer("transformers sdpa, arrival order, batches of 32", "transformers", _transformers("sdpa", 32, False),
                single=False),
    EncoderPeer("transformers eager, sorted, batches of 4", "transformers", _transformers("eager", 4, True), CPU_ONLY,
                slow=True),
    EncoderPeer("transformers eager, sorted, batches of 32", "transformers", _transformers("eager", 32, True), GPU_ONLY,
                slow=True),
    EncoderPeer("transformers eager, arrival order, batches of 32", "transformers", _transformers("eager", 32, False),
                slow=True, single=False),
    EncoderPeer("torch.compile, frozen, transformers sdpa, sorted, batches of 4", "torch.compile",
                _transformers("sdpa", 4, True, "default"), CPU_ONLY, package="torch", slow=True),
    EncoderPeer("torch.compile max-autotune, frozen, transformers sdpa, sorted, batches of 4", "torch.compile",
                _transformers("sdpa", 4, True, "max-autotune-no-cudagraphs"), CPU_ONLY, package="torch", slow=True),
    EncoderPeer("torch.compile, transformers sdpa, sorted, batches of 32", "torch.compile",
                _transformers("sdpa", 32, True, "default"), GPU_ONLY, package="torch", slow=True,
                single=False),
    EncoderPeer("torch.compile reduce-overhead, transformers sdpa", "torch.compile",
                _transformers("sdpa", 1, True, "reduce-overhead"), GPU_ONLY, package="torch", slow=True,
                many=False),  # its CUDA graphs, beside ours
    EncoderPeer("torch.compile max-autotune, transformers sdpa, sorted, batches of 32", "torch.compile",
                _transformers("sdpa", 32, True, "max-autotune-no-cudagraphs"), GPU_ONLY, package="torch", slow=True,
                single=False),
)  # fmt: skip


def _fitting(job: Job) -> list[EncoderPeer]:
    """Batches of about 128 and 256 tokens: what is fastest for them on a CPU, be the texts queries or documents."""
    mean_length = job.workload.tokens / len(job.rows)
    sizes = sorted({max(1, 2 ** round(math.log2(tokens / mean_length))) for tokens in (128, 256)})
    options = {"devices": CPU_ONLY, "slow": False}
    return [
        *_sizes("transformers sdpa", "transformers", _sdpa, sizes, **options),
        *_sizes("openvino", "openvino", _openvino, sizes, **options),
        *_sizes("onnxruntime fp32", "onnxruntime", lambda n: _onnxruntime(_fused, n), sizes, **options,
                dtypes=(torch.float32,)),
    ]  # fmt: skip


def rows(job: Job, every: bool) -> list[Row]:
    """The rows of a case of this workload, the slow ones too where `every` says so.

    One query leaves out those that only differ in how they batch; where not every size is measured, those are that fit
    the lengths.
    """
    single = len(job.rows) == 1
    peers = {p.row: p for p in (*PEERS, *(() if single or every else _fitting(job)))}
    return [
        Row(
            p.row.split(", sorted")[0] if single else p.row, p.peer, functools.partial(p.make, job),
            package=p.package, checked=p.checked, slow=p.slow, tolerance=p.tolerance,
            settings={} if p.tolerance is None else {"tolerance": p.tolerance},
        )
        for p in peers.values()
        if job.device.type in p.devices
        and (p.single if single else p.many)
        and (p.dtypes is None or job.dtype in p.dtypes)
        and (every or not p.slow)
    ]  # fmt: skip
