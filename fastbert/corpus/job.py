"""The settings of a run, as plain data that can be sent to other processes and machines."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import __version__

if TYPE_CHECKING:
    from ..encoding.encoder import Encoder

PRECISIONS = ("float32", "float16", "int8")
NULLS = ("null", "fill", "encode", "refuse")
VECTOR, SCALE, VALID = "embedding", "embedding_scale", "embedding_valid"


@dataclass(frozen=True)
class Job:
    """How a corpus is encoded.

    Args:
        out: the folder that is written, or its URL.
        encoder: arguments of `Encoder.from_pretrained`.
        text: name of the column of texts.
        id: name of a column whose value identifies a row in messages. It is kept, as the first column.
        keep: names of other columns to keep, in this order.
        precision: how vectors are stored: float32, float16, or int8 with a scale for each row.
        nulls: what a row without a text gets. "null": a null vector; "fill": zeros, and false in the column
            `embedding_valid`; "encode": the vector of the empty text; "refuse": its part fails with an error.
        empty_is_null: whether a text that is empty or only white space is treated as a null.
        dedup: whether equal texts of a window are computed once.
        batch_invariant: see `fastbert.batch_invariant`.
        part_rows: the largest number of rows in a part.
        max_tokens_per_batch: see `Encoder.encode`.
        line_bytes: the longest line in .jsonl files.
        types: the types of the kept columns, which `plan` sets.
    """

    out: str
    encoder: Mapping[str, Any]
    text: str = "text"
    id: str | None = None
    keep: tuple[str, ...] = ()
    precision: str = "float32"
    nulls: str = "null"
    empty_is_null: bool = False
    dedup: bool = False
    batch_invariant: bool = False
    part_rows: int = 50_000
    max_tokens_per_batch: int | None = None
    line_bytes: int = 10_000_000
    types: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.out.strip():
            raise ValueError(f"out must be a folder or a URL, got {self.out!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.nulls not in NULLS:
            raise ValueError(f"nulls must be one of {', '.join(NULLS)}, got {self.nulls!r}")
        for name in self.kept:
            if name in (VECTOR, SCALE, VALID):
                raise ValueError(f"the column {name!r} cannot be kept: the vectors take that name")
        if len(set(self.kept)) != len(self.kept):
            raise ValueError(f"a column is kept twice: {', '.join(self.kept)}")

    @property
    def kept(self) -> tuple[str, ...]:
        """The columns of the input that are copied to the output."""
        return (*(() if self.id is None or self.id in self.keep else (self.id,)), *self.keep)

    def description(self, encoder: Encoder) -> dict[str, Any]:
        """Everything besides the unit that decides what is in a part: the model, the settings and the versions. It is
        written to the manifest and into the metadata of each part."""
        return {
            "model": str(self.encoder["id_or_path"]),
            "arguments": {name: value for name, value in self.encoder.items() if name in ARGUMENTS},
            "revision": revision_of(str(self.encoder["id_or_path"])),
            "weights": fingerprint(encoder),
            "dimension": encoder.dimension,
            "pooling": encoder.pooling,
            "normalize": encoder.normalize,
            "layers": self.encoder.get("layers") or self.encoder.get("layer", -1),
            "combine": encoder.combine,
            "prompt": encoder.prompt,
            "task": encoder.task,
            "max_length": encoder.max_length,
            "dtype": self.encoder.get("dtype", "auto") if self.encoder.get("dtype") == "int8" else str(encoder.dtype),
            "device": encoder.device.type,
            "instructions": _instructions(encoder) if self.batch_invariant else None,
            "operators": sorted({chosen for chosen, _ in encoder.describe_operators().values()}),
            "max_tokens_per_batch": encoder.token_budget(self.max_tokens_per_batch),
            "batch_invariant": self.batch_invariant,
            "text": self.text,
            "columns": dict(self.types),
            "precision": self.precision,
            "nulls": self.nulls,
            "empty_is_null": self.empty_is_null,
            "dedup": self.dedup,
            "part_rows": self.part_rows,
            "versions": {"fastbert": __version__} | {name: _version(name) for name in LIBRARIES},
        }


LIBRARIES = ("torch", "tokenizers", "pyarrow")
# Arguments of `Encoder.from_pretrained` that `search` needs to encode a question as the rows were encoded.
ARGUMENTS = ("pooling", "normalize", "layer", "dtype", "max_length", "impl", "truncate_dim", "layers", "combine")
# These may differ when a run is resumed: the model may have moved, and defaults may be given explicitly. The hash of
# the weights and the other settings say whether vectors are the same.
SPELLINGS = ("model", "revision", "arguments")


def differences(before: Mapping[str, Any], now: Mapping[str, Any], inside: str = "") -> list[str]:
    """The differences between two descriptions, in words."""
    found = []
    for name in sorted({*before, *now} - set(SPELLINGS)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{inside}{name} ")
        elif old != new:
            found.append(f"{inside}{name} is {old!r}, and here it is {new!r}")
    return found


def fingerprint(encoder: Encoder) -> str:
    """A hash of the configuration, the weights in their dtype, the tokenizer, and the modules after BERT."""
    import torch

    digest = hashlib.sha256(repr(sorted(encoder.config.to_dict().items())).encode())
    digest.update(encoder.tokenizer.definition().encode())
    digest.update(f"{encoder.modules} {encoder.lowercase}".encode())
    for module in (encoder.model, encoder.modules):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def revision_of(model: str) -> str | None:
    """The commit of a model from the hub, looked up in the local cache; None for a folder."""
    from huggingface_hub import try_to_load_from_cache

    if os.path.exists(os.path.expanduser(model)) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        return None
    file = try_to_load_from_cache(model, "config.json")
    found = re.search(r"snapshots/([0-9a-f]{40})/", str(file))
    return found and found[1]


def _instructions(encoder: Encoder) -> str:
    """The CPU or GPU, as far as bits depend on it."""
    import torch

    from ..functional import describe_cpp

    if encoder.device.type == "cuda":
        return torch.cuda.get_device_name(encoder.device)
    return f"{torch.backends.cpu.get_cpu_capability()}, {describe_cpp()}"


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
