"""sentence-transformers: its own encode, and its way with flash attention, where each batch is one sequence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..harness.peer import GPU_ONLY, EncoderPeer, Run, SentencePeer, need, version
from . import flash_attn, transformers

if TYPE_CHECKING:
    from torch import Tensor

    from ..harness.jobs import Job

PEER = "sentence-transformers"


def unpadded(size: int, attention: str = "flash_attention_2") -> Callable[[Job], Run]:
    """Repeats what sentence-transformers does with attn_implementation="flash_attention_2": a batch is one sequence.

    Its Transformer module collates with `DataCollatorWithFlattening`, attention gets the starts of the texts, and its
    Pooling sums over the flat batch. (Tokenising is not measured, as for all rows.)
    """

    def make(job: Job) -> Run:
        import torch
        from torch import Tensor

        from ..harness.jobs import groups

        need(PEER)
        theirs = need("transformers")
        if attention == "flash_attention_2":
            flash_attn.module_for(job)
        modules = need(PEER, "sentence_transformers.sentence_transformer.modules")
        pooling = modules.Pooling(job.workload.model.hidden)
        collate = theirs.DataCollatorWithFlattening(
            return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
        )
        model = transformers.model_of(job, attention)
        names = ("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

        @torch.inference_mode()
        def run() -> Tensor:
            vectors = torch.empty(len(job.rows), job.workload.model.hidden, device=job.device)
            for group in groups(job, size, True):
                flat = collate([{"input_ids": job.rows[n]} for n in group])
                flat = {k: v.to(job.device) if isinstance(v, Tensor) else v for k, v in flat.items()}
                hidden = model(**{name: flat[name] for name in names}).last_hidden_state
                pooled = pooling({"token_embeddings": hidden, **flat})["sentence_embedding"]
                vectors[group] = pooled.float()
            return vectors.cpu()

        return run

    return make


def model(folder: Path, device: Any, **options: Any) -> Any:
    return need(PEER).SentenceTransformer(str(folder), device=str(device), **options)


def encode(model: Any, texts: list[str], size: int) -> Run:
    def run() -> Tensor:
        return model.encode(texts, batch_size=size, convert_to_tensor=True, show_progress_bar=False).float()

    return run


def as_it_is(folder: Path, texts: list[str], size: int, device: Any, dtype: Any) -> Run:
    return encode(model(folder, device).to(dtype), texts, size)


def exported(folder: Path, backend: str, packages: str) -> Path:
    """The folder of the checkpoint with a graph for `backend`, made by the library's own exporter. That may take a
    minute, so the folder is kept in the user's cache."""
    versions = "-".join(str(version(name)) for name in ("transformers", *packages.split()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastbert-bench"
    kept = cache / f"minilm-{backend}-{versions}"
    if not kept.is_dir():
        unfinished = kept.with_name(f"{kept.name}.{os.getpid()}")
        shutil.copytree(folder, unfinished, dirs_exist_ok=True)
        made = model(unfinished, "cpu", backend=backend)
        made[0].auto_model.save_pretrained(unfinished)
        unfinished.rename(kept)
    return kept


ENCODERS = (
    EncoderPeer("sentence-transformers unpadded, sorted, batches of 32", PEER, unpadded(32), GPU_ONLY, single=False),
    EncoderPeer("sentence-transformers unpadded, sorted, batches of 128", PEER, unpadded(128), GPU_ONLY),
)
SENTENCES = (SentencePeer("as it is", PEER, as_it_is, PEER),)
