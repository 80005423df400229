"""ONNX Runtime on a CPU: a graph fused for BERT in float32, and the same graph with 8-bit weights."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..harness.peer import CPU_ONLY, INT8, EncoderPeer, Missing, ProcessPeer, Run, SentencePeer, need
from . import sentence_transformers

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from fastbert.testing import ModelShape

    from ..harness.jobs import Job

PEER = "onnxruntime"

# ---- files: a graph is exported once for each model and serves all batches -------------------------------


@functools.cache
def fused(shape: ModelShape, positions: int) -> Path:
    """The graph with dynamic sizes, fused for BERT by ONNX Runtime's optimiser."""
    from ..harness.jobs import example, scratch_folder

    need("onnx")
    optimizer = need(PEER, "onnxruntime.transformers.optimizer")
    folder = Path(tempfile.mkdtemp(dir=scratch_folder()))
    path = _onnx_file(*example(shape, positions), folder / "plain.onnx")
    optimizer.optimize_model(str(path), "bert", shape.heads, shape.hidden).save_model_to_file(
        str(folder / "fused.onnx")
    )
    path.unlink()
    return folder / "fused.onnx"


@functools.cache
def quantised(shape: ModelShape, positions: int) -> Path:
    """The graph with int8 weights, a scale for each column, and activations quantised at run time
    (`quantize_dynamic`)."""
    whole = fused(shape, positions)
    need(PEER, "onnxruntime.quantization").quantize_dynamic(
        str(whole), str(whole.with_name("int8.onnx")), per_channel=True,
        extra_options={"DefaultTensorType": 1},  # 1: float, for tensors whose type cannot be inferred
    )  # fmt: skip
    return whole.with_name("int8.onnx")


def _onnx_file(bert: nn.Module, inputs: tuple[Tensor, Tensor], path: Path) -> Path:
    """The model as ONNX, with dynamic sizes."""
    import torch

    names, sizes = ("input_ids", "attention_mask", "hidden"), {0: "batch", 1: "length"}
    torch.onnx.export(
        bert, inputs, str(path), dynamo=False, input_names=names[:2], output_names=names[2:],
        dynamic_axes=dict.fromkeys(names, sizes), opset_version=17,
    )  # fmt: skip
    return path


# ---- rows ------------------------------------------------------------------------------------------------


def _session(file: str, threads: int) -> Any:
    """A session with ONNX Runtime's defaults: all threads compute one batch, and idle threads spin."""
    ort = need(PEER)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _encoder(file: Callable[[ModelShape, int], Path], size: int) -> Callable[[Job], Run]:
    def make(job: Job) -> Run:
        import torch

        from ..harness.jobs import padded_run

        need(PEER)
        if job.device.type != "cpu":
            raise Missing("measured on CPUs only")
        path = functools.partial(file, *job.exported_as)
        run = job.once(file, lambda: _session(str(path()), torch.get_num_threads())).run

        def call(ids: Tensor, mask: Tensor) -> Tensor:
            return torch.from_numpy(run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])

        return padded_run(call, job, size, True)

    return make


def _sentences(folder: Path, texts: list[str], size: int, device: Any, dtype: Any) -> Run:
    need("optimum-onnx", "optimum.onnxruntime")
    kept = sentence_transformers.exported(folder, "onnx", "optimum-onnx onnxruntime")
    options = {"provider": "CPUExecutionProvider"}
    model = sentence_transformers.model(kept, device, backend="onnx", model_kwargs=options)
    return sentence_transformers.encode(model, texts, size)


def in_process(job: dict[str, Any]) -> Callable[[list[list[int]]], np.ndarray]:
    need(PEER)

    from ..harness.child_tools import in_batches, say

    say("imported")
    session = _session(job["file"], job["threads"])
    return in_batches(lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0], job["batch"])


def _file(files: Any) -> dict[str, Any]:
    return {"file": str(fused(*files.job.exported_as))}


def _int8_file(files: Any) -> dict[str, Any]:
    return {"file": str(quantised(*files.job.exported_as))}


FP32, EIGHT_BITS = "onnxruntime fp32", f"onnxruntime int8 (tolerance {INT8:.0%})"
ENCODERS = (
    EncoderPeer(FP32, PEER, functools.partial(_encoder, fused), CPU_ONLY, sizes=(2, 4), fits=True, dtypes=("float32",)),
    EncoderPeer(EIGHT_BITS, PEER, functools.partial(_encoder, quantised), CPU_ONLY, sizes=(2, 4), slow=True,
                tolerance=INT8),
)  # fmt: skip
PROCESSES = (
    ProcessPeer(FP32, PEER, __name__, _file, CPU_ONLY, ("float32",)),
    ProcessPeer(EIGHT_BITS, PEER, __name__, _int8_file, CPU_ONLY, slow=True, tolerance=INT8, suites=("cold",)),
)
# its graph computes in float32
SENTENCES = (SentencePeer("ONNX backend", PEER, _sentences, PEER, devices=CPU_ONLY, dtypes=("float32",)),)
