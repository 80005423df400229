"""Whole encoders by everybody: lists of token ids in, one mean-pooled vector each out, in the order given.

All start from the same weights and the same ids, and each pays for its own sorting, padding or packing. Tokenising is
nobody's here.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor

from fastbert import functional as F
from fastbert.config import BertConfig
from fastbert.embed import TOKENS_PER_BATCH, _batches
from fastbert.models.bert import BertModel
from fastbert.packing import PackedBatch
from fastbert.testing import ModelShape, Workload

from .case import Missing, Row, Run, need
from .plain_bert import PlainBert
from .workloads import padded, token_ids

Padded = Callable[[Tensor, Tensor], Tensor]  # input_ids, attention_mask [B, S] -> hidden states [B, S, C]


@functools.lru_cache(maxsize=1)
def weights(shape: ModelShape, positions: int) -> tuple[BertConfig, dict[str, Tensor]]:
    """A BERT of this shape with random weights, the same in every process."""
    config = BertConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.intermediate, max_position_embeddings=positions,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return config, BertModel(config, add_pooling_layer=False).state_dict()


@dataclass(frozen=True)
class Job:
    """What every encoder is given."""

    workload: Workload
    dtype: torch.dtype
    device: torch.device

    @property
    def model(self) -> tuple[BertConfig, dict[str, Tensor]]:
        return weights(self.workload.model, max(512, *self.workload.lengths))

    @functools.cached_property
    def rows(self) -> list[list[int]]:
        return token_ids(self.workload.lengths, self.workload.model.vocab)

    def plain(self, dtype: torch.dtype) -> PlainBert:
        config, state = self.model
        bert = PlainBert(state, config.num_hidden_layers, config.num_attention_heads, config.layer_norm_eps)
        return bert.to(self.device, dtype).eval()

    def truth(self, dtype: torch.dtype) -> list[Tensor]:
        return [padded_run(self.plain(dtype), self, 8, by_length=True)()]


def _groups(job: Job, size: int, by_length: bool) -> Iterator[list[int]]:
    order = list(range(len(job.rows)))
    if by_length:
        order.sort(key=lambda n: len(job.rows[n]), reverse=True)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    real = mask[..., None].to(hidden.dtype if hidden.dtype == torch.float64 else torch.float32)
    return (hidden.to(real.dtype) * real).sum(1) / real.sum(1)


def padded_run(model: Padded, job: Job, size: int, by_length: bool) -> Run:
    """Batches of `size`, each padded to its longest."""

    @torch.inference_mode()
    def run() -> Tensor:
        vectors = None
        for group in _groups(job, size, by_length):
            ids, mask = padded([job.rows[n] for n in group], job.device)
            pooled = _mean(model(ids, mask), mask)
            if vectors is None:
                vectors = pooled.new_empty(len(job.rows), pooled.shape[1])
            vectors[group] = pooled
        return vectors

    return run


# ---- ours, and the floor ---------------------------------------------------------------------------------


def _budget(job: Job) -> int:
    return TOKENS_PER_BATCH["cuda" if job.device.type == "cuda" else "cpu"]


def _fastbert(job: Job) -> Run:
    config, state = job.model
    model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict(state)
    model.to(job.device, job.dtype).eval()
    lengths = [len(row) for row in job.rows]

    @torch.inference_mode()
    def run() -> Tensor:
        vectors = torch.empty(len(lengths), config.hidden_size, device=job.device)
        for group in _batches(
            sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True), lengths, _budget(job)
        ):
            batch = PackedBatch.from_lists([job.rows[n] for n in group], device=job.device)
            vectors[group] = F.pool(model(batch).last_hidden_state, batch.cu_seqlens).float()
        return vectors

    return run


def _graph(job: Job) -> Run:
    """One batch, packed beforehand; its launches captured once and replayed."""
    config, state = job.model
    model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict(state)
    model.to(job.device, job.dtype).eval()
    batch = PackedBatch.from_lists(job.rows, device=job.device)

    @torch.inference_mode()
    def forward() -> Tensor:
        return F.pool(model(batch).last_hidden_state, batch.cu_seqlens).float()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries and kernels must be ready before the capture
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        vectors = forward()

    def run() -> Tensor:
        graph.replay()
        return vectors

    return run


def _floor(job: Job) -> Run:
    """The model's own matrix products on the real tokens through the vendor's library, and nothing else."""
    config, state = job.model
    names = (
        "attention.self.query", "attention.self.key", "attention.self.value",
        "attention.output.dense", "intermediate.dense", "output.dense",
    )  # fmt: skip
    layers = []
    for n in range(config.num_hidden_layers):
        q, k, v, *rest = (state[f"encoder.layer.{n}.{name}.weight"].to(job.device, job.dtype) for name in names)
        layers.append([torch.cat((q, k, v)), *rest])
    lengths = [len(row) for row in job.rows]
    tokens = [sum(lengths[n] for n in group) for group in _batches(list(range(len(lengths))), lengths, _budget(job))]
    inputs = [torch.randn(t, config.hidden_size, device=job.device).to(job.dtype) for t in tokens]

    @torch.inference_mode()
    def run() -> Tensor:
        for x in inputs:
            for qkv, out, up, down in layers:
                tf.linear(x, qkv)
                y = tf.linear(tf.linear(tf.linear(x, out), up), down)
        return y

    return run


# ---- others ----------------------------------------------------------------------------------------------


def _transformers(attention: str, size: int, by_length: bool, mode: str | None = None):
    def make(job: Job) -> Run:
        need("transformers")
        from transformers import BertConfig as TheirConfig
        from transformers import BertModel as TheirModel

        if attention == "flex_attention" and job.device.type != "cuda":
            raise Missing("flex attention is compiled for GPUs")
        config, state = job.model
        theirs = TheirConfig(**{k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")})
        theirs._attn_implementation = attention
        model = TheirModel(theirs, add_pooling_layer=False)
        model.load_state_dict(state, strict=False)
        model.to(job.device, job.dtype).eval()
        call = model if mode is None else torch.compile(model, dynamic=True, mode=None if mode == "default" else mode)
        return padded_run(
            lambda ids, mask: call(input_ids=ids, attention_mask=mask).last_hidden_state, job, size, by_length
        )

    return make


def _nested(job: Job) -> Run:
    """torch.nn.TransformerEncoder, whose fast path drops the padding into a nested tensor."""
    config, state = job.model
    layer = torch.nn.TransformerEncoderLayer(
        config.hidden_size, config.num_attention_heads, config.intermediate_size, 0.0, "gelu",
        config.layer_norm_eps, batch_first=True,
    )  # fmt: skip
    stack = torch.nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=True)
    for n, theirs in enumerate(stack.layers):
        at = f"encoder.layer.{n}."
        pairs = {
            "self_attn.out_proj": "attention.output.dense", "norm1": "attention.output.LayerNorm",
            "linear1": "intermediate.dense", "linear2": "output.dense", "norm2": "output.LayerNorm",
        }  # fmt: skip
        loaded = {f"{t}.{kind}": state[f"{at}{o}.{kind}"] for t, o in pairs.items() for kind in ("weight", "bias")}
        for kind in ("weight", "bias"):
            qkv = [state[f"{at}attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            loaded[f"self_attn.in_proj_{kind}"] = torch.cat(qkv)
        theirs.load_state_dict(loaded)
    stack.to(job.device, job.dtype).eval()
    embed = PlainBert(state, 0, config.num_attention_heads, config.layer_norm_eps).to(job.device, job.dtype)

    def call(ids: Tensor, mask: Tensor) -> Tensor:
        out = stack(embed(ids, mask), src_key_padding_mask=mask == 0)
        return tf.pad(out, (0, 0, 0, ids.shape[1] - out.shape[1])).nan_to_num()

    return padded_run(call, job, 32, True)


def _onnx_file(job: Job, folder: str) -> Path:
    """The plain model in float32 as ONNX, with dynamic sizes."""
    need("onnx")
    path = Path(folder) / "bert.onnx"
    sizes = {0: "batch", 1: "length"}
    names = ("input_ids", "attention_mask", "hidden")
    example = padded(job.rows[:2], torch.device("cpu"))
    bert = Job(job.workload, torch.float32, torch.device("cpu")).plain(torch.float32)
    torch.onnx.export(
        bert, example, str(path), dynamo=False, input_names=names[:2], output_names=names[2:],
        dynamic_axes=dict.fromkeys(names, sizes), opset_version=17,
    )  # fmt: skip
    return path


def _onnxruntime(quantised: bool, size: int = 8):
    def make(job: Job) -> Run:
        ort = need("onnxruntime")
        if job.device.type != "cpu":
            raise Missing("measured on CPUs only")
        with tempfile.TemporaryDirectory() as folder:
            path = _onnx_file(job, folder)
            optimised = need("onnxruntime", "onnxruntime.transformers.optimizer").optimize_model(
                str(path), "bert", job.workload.model.heads, job.workload.model.hidden
            )
            path = Path(folder) / "fused.onnx"
            optimised.save_model_to_file(str(path))
            if quantised:
                target = Path(folder) / "int8.onnx"
                need("onnxruntime", "onnxruntime.quantization").quantize_dynamic(
                    str(path),
                    str(target),
                    extra_options={"DefaultTensorType": 1},  # 1: float, where it cannot infer
                )
                path = target
            options = ort.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        def call(ids: Tensor, mask: Tensor) -> Tensor:
            feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
            return torch.from_numpy(session.run(None, feed)[0])

        return padded_run(call, job, size, True)

    return make


def _openvino(size: int):
    """Two requests in flight, as its guide to throughput asks for."""

    def make(job: Job) -> Run:
        ov = need("openvino")
        if job.device.type != "cpu":
            raise Missing("measured on CPUs only")
        bert = Job(job.workload, torch.float32, torch.device("cpu")).plain(torch.float32)
        converted = ov.convert_model(bert, example_input=padded(job.rows[:2], torch.device("cpu")))
        hint = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[job.dtype]
        flight = min(2, max(1, torch.get_num_threads()))
        settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        settings |= {"NUM_STREAMS": flight} if len(job.rows) > size else {"PERFORMANCE_HINT": "LATENCY"}
        compiled = ov.Core().compile_model(converted, "CPU", settings)
        queue = ov.AsyncInferQueue(compiled, flight)
        names = [port.get_any_name() for port in compiled.inputs]

        def run() -> Tensor:
            vectors = torch.empty(len(job.rows), job.workload.model.hidden)

            def done(request: Any, given: tuple[list[int], Tensor]) -> None:
                group, mask = given
                vectors[group] = _mean(torch.from_numpy(request.get_output_tensor(0).data.copy()), mask)

            queue.set_callback(done)
            for group in _groups(job, size, True):
                ids, mask = padded([job.rows[n] for n in group], job.device)
                queue.start_async(dict(zip(names, (ids.numpy(), mask.numpy()), strict=True)), (group, mask))
            queue.wait_all()
            return vectors

        return run

    return make


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


GPU_ONLY = ("cuda",)
FLOOR = "matrix products alone"
PEERS = (
    EncoderPeer("fastbert", "fastbert", _fastbert),
    EncoderPeer("fastbert, CUDA graph", "fastbert", _graph, GPU_ONLY, many=False),
    EncoderPeer(FLOOR, "floor", _floor, checked=False, package="torch"),
    EncoderPeer("transformers sdpa, sorted, batches of 8", "transformers", _transformers("sdpa", 8, True)),
    EncoderPeer("transformers sdpa, sorted, batches of 32", "transformers", _transformers("sdpa", 32, True),
                single=False),
    EncoderPeer("transformers sdpa, arrival order, batches of 32", "transformers", _transformers("sdpa", 32, False),
                single=False),
    EncoderPeer("transformers eager, sorted, batches of 32", "transformers", _transformers("eager", 32, True),
                slow=True),
    EncoderPeer("transformers flex, sorted, batches of 32", "transformers", _transformers("flex_attention", 32, True),
                devices=GPU_ONLY),
    EncoderPeer("torch.compile, transformers sdpa, sorted, batches of 8", "torch.compile",
                _transformers("sdpa", 8, True, "default"), package="torch", slow=True),
    EncoderPeer("torch.compile max-autotune, transformers sdpa, sorted, batches of 32", "torch.compile",
                _transformers("sdpa", 32, True, "max-autotune-no-cudagraphs"), GPU_ONLY, package="torch", slow=True),
    EncoderPeer("nn.TransformerEncoder nested, sorted, batches of 32", "torch", _nested, single=False),
    EncoderPeer("onnxruntime fp32, sorted, batches of 8", "onnxruntime", _onnxruntime(False), ("cpu",),
                dtypes=(torch.float32,)),
    EncoderPeer("onnxruntime int8, sorted, batches of 8", "onnxruntime", _onnxruntime(True), ("cpu",), slow=True),
    EncoderPeer("openvino, sorted, batches of 4", "openvino", _openvino(4), ("cpu",)),
    EncoderPeer("openvino, sorted, batches of 8", "openvino", _openvino(8), ("cpu",), slow=True, single=False),
    EncoderPeer("openvino, sorted, batches of 32", "openvino", _openvino(32), ("cpu",), slow=True, single=False),
)  # fmt: skip


def rows(job: Job, single: bool = False) -> list[Row]:
    """The rows of a case; `single` leaves out those that only differ in how they batch."""
    return [
        Row(p.row, p.peer, functools.partial(p.make, job), package=p.package, checked=p.checked, slow=p.slow)
        for p in PEERS
        if job.device.type in p.devices
        and (p.single if single else p.many)
        and (p.dtypes is None or job.dtype in p.dtypes)
    ]
