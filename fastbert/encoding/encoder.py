"""Text in, vectors out: tokenise, sort by length, pack, run, pool, and give the vectors back in input order."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checkpoint
from .. import functional as F
from ..formats import opened
from ..formats.detect import find_source
from ..inference.graphs import why_no_graphs
from ..inference.weights import prepack, quantise, why_not_int8
from ..models.bert import BertModel
from ..packing import PackedBatch
from ..text.batching import CHUNK_TEXTS, chunks_of, even_batches, filling, one_ahead, run_batches, tokens_per_batch

if TYPE_CHECKING:  # whoever brings ids, as the benchmarks do, does without the tokenizers library
    from ..text.tokenizer import Tokenizer

POOLING = (*F.POOLING_MODES, "pooler")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INT8 = "int8"  # a way to multiply, not the dtype of a model

# What the share of avoided padding is measured against: batches of this many texts in arrival order.
PADDED_BATCH = 32


@dataclass
class EncodeStats:
    """Running totals of an Encoder. `padded_tokens` is what padded batches of 32 in arrival order would compute."""

    texts: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    seconds: float = 0.0

    @property
    def padding_avoided(self) -> float:
        """The share of a padded batch's tokens that are padding, 0 to 1."""
        return 1.0 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class SentenceConfig:
    """What a sentence-transformers folder says of the vectors; the defaults are that library's for a plain BERT."""

    pooling: str = "mean"
    normalize: bool = False
    max_length: int | None = None
    lowercase: bool = False  # lower the text before tokenising, on top of what the tokenizer does
    prompt: str = ""  # put before every text

    @classmethod
    def from_folder(cls, folder: Path) -> SentenceConfig:
        """Reads modules.json and what it points to; of a GGUF file, its pooling type.

        Raises: ValueError on a module that is not supported.
        """
        source = find_source(folder)
        if source is not None and source.pooling is not None:
            return cls(pooling=source.pooling)
        if not (folder / "modules.json").is_file():
            return cls()
        found = {}
        library = _read_json(folder / "config_sentence_transformers.json", missing={})
        if library.get("default_prompt_name"):
            found["prompt"] = library["prompts"][library["default_prompt_name"]]
        for module in _read_json(folder / "modules.json"):
            kind, path = module["type"].rsplit(".", 1)[-1], folder / module["path"]
            if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder)):
                raise checkpoint.CheckpointError(
                    f"{folder / 'modules.json'}: the path {module['path']!r} leads out of the folder"
                )
            if kind == "Transformer":
                settings = _read_json(path / "sentence_bert_config.json", missing={})
                found["max_length"] = settings.get("max_seq_length")
                found["lowercase"] = settings.get("do_lower_case", False)
            elif kind == "Pooling":
                settings = _read_json(path / "config.json")
                found["pooling"] = _pooling_mode(settings, path)
                if found.get("prompt") and not settings.get("include_prompt", True):
                    raise ValueError(f"{path}: leaving the prompt out of the pooling is not supported")
            elif kind == "Normalize":
                found["normalize"] = True
            else:
                raise ValueError(f"{folder / 'modules.json'}: module {kind!r} is not supported; known are "
                                 "Transformer, Pooling and Normalize")  # fmt: skip
        return cls(**found)


def _read_json(path: Path, missing=None):
    if missing is not None and not path.is_file():
        return missing
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise checkpoint.CheckpointError(f"{path}: {error}") from error


def _pooling_mode(settings: dict, path: Path) -> str:
    names = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "cls": "cls", "mean": "mean", "max": "max"}
    modes = settings.get("pooling_mode")  # the newer spelling; else one boolean a mode
    if modes is None:
        modes = [
            key.removeprefix("pooling_mode_") for key, on in settings.items() if key.startswith("pooling_mode_") and on
        ]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in names:
        raise ValueError(f"{path}: pooling {' + '.join(modes) or 'none'} is not supported; one of {F.POOLING_MODES} is")
    return names[modes[0]]


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto": CUDA where there is a GPU, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} was asked for, but torch sees no CUDA device")
    return device


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto": what the hardware multiplies fast, of most use first: bfloat16 (AVX512-BF16 or AMX; compute capability
    8.0 and AMD's cards), float16 (compute capability 7.0), else float32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, {INT8}, got {dtype!r}")
        return DTYPES[dtype]
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is not None or capability >= (8, 0):
            return torch.bfloat16
        return torch.float16 if capability >= (7, 0) else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def _expect_int8(device: torch.device, impl: F.Impl | None) -> None:
    """Raises ValueError, saying why, where int8 is not to be had."""
    reason = why_not_int8()
    if device.type != "cpu":
        reason = f"it is for CPUs, and the device is {device}"
    elif F.choose_impl(impl, device) != "native":
        reason = f'impl "{F.choose_impl(impl, device)}" has no 8-bit products, "native" has'
    if reason is not None:
        raise ValueError(f"dtype int8 cannot be had here: {reason}")


class Encoder:
    """A BERT that turns texts into vectors.

        encoder = Encoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
        vectors = encoder.encode(["A man is eating.", "Ein Mann isst."])    # [2, 384] float32

    Args:
        model: in evaluation mode, on the device and in the dtype to use.
        tokenizer: makes its ids.
        pooling: mean, cls or max over a text's tokens, or pooler (BERT's own: tanh of a linear layer of the first).
        normalize: divide each vector by its L2 norm.
        max_length: longest text in tokens, [CLS] and [SEP] included; the rest of a longer one is cut off.
        lowercase: lower the text before tokenising.
        prompt: put before every text.
    """

    def __init__(
        self,
        model: BertModel,
        tokenizer: Tokenizer,
        *,
        pooling: str = "mean",
        normalize: bool = False,
        max_length: int | None = None,
        lowercase: bool = False,
        prompt: str = "",
    ):
        if pooling not in POOLING:
            raise ValueError(f"pooling must be one of {POOLING}, got {pooling!r}")
        if pooling == "pooler" and model.pooler is None:
            raise ValueError('pooling "pooler" needs a model with a pooler; this one has none')
        longest = model.config.max_position_embeddings
        max_length = min(longest, tokenizer.model_max_length or longest) if max_length is None else max_length
        if not 2 <= max_length <= longest:
            raise ValueError(f"max_length must be 2 to {longest} (the position table), got {max_length}")
        self.model, self.tokenizer = model, tokenizer
        self.pooling, self.normalize, self.max_length = pooling, normalize, max_length
        self.lowercase, self.prompt = lowercase, prompt
        self.stats = EncodeStats()
        prepack(model)

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | Path,
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        layer: int = -1,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        max_length: int | None = None,
        impl: F.Impl | None = None,
        cuda_graphs: bool | None = None,
    ) -> Encoder:
        """Loads a BERT folder or hub id, sentence-transformers' kind (modules.json) or a plain one, or another format.

        Args:
            pooling, normalize, max_length: None takes what the folder says (a plain BERT: mean, not normalised).
            layer: whose output is pooled: 1 is the first layer, 0 the embeddings, -1 the last, as an index into
                hidden_states. Layers above it are not loaded.
            dtype: auto, float32, bfloat16, float16 or int8; auto is bfloat16 where the hardware multiplies it, float16
                on a GPU that multiplies that alone (V100, T4), else float32. int8,
                on a CPU with VNNI or AMX, multiplies 8-bit weights by 8-bit activations and does all else as auto.
            device: auto, cpu, cuda, ...
            impl: see `fastbert.functional`.
            cuda_graphs: replay recorded launches for batches that would wait for them: see
                `BertModel.use_cuda_graphs`. None does so on a CUDA device where the kernels are Triton's; it is safe
                there, since an Encoder takes no gradients, and a recording is dropped when a weight or a hook of the
                model changes. False never does.

        Raises: CheckpointError and ValueError, with messages of one line.
        """
        from ..text.tokenizer import Tokenizer

        device = resolve_device(device)
        int8 = dtype in (INT8, torch.int8)
        if int8:
            _expect_int8(device, impl)
        dtype = resolve_dtype("auto" if int8 else dtype, device)
        F.choose_impl(impl, device)
        with opened(id_or_path) as path:
            sentence = SentenceConfig.from_folder(path)
            tokenizer = Tokenizer.from_pretrained(path)
            model = BertModel.from_pretrained(path, dtype=dtype, device=device, impl=impl)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"{id_or_path}: the tokenizer knows {tokenizer.vocab_size} words, the model {model.config.vocab_size}"
            )
        pooling = sentence.pooling if pooling is None else pooling
        _keep_layers(model, layer, pooling)
        if int8:
            quantise(model)
        if cuda_graphs or (cuda_graphs is None and why_no_graphs(model, impl) is None):
            model.use_cuda_graphs()
        if max_length is None and sentence.max_length is not None:
            max_length = min(sentence.max_length, model.config.max_position_embeddings)
        return cls(
            model,
            tokenizer,
            pooling=pooling,
            normalize=sentence.normalize if normalize is None else normalize,
            max_length=max_length,
            lowercase=sentence.lowercase,
            prompt=sentence.prompt,
        )

    @property
    def config(self):
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def dimension(self) -> int:
        """C, the width of a vector."""
        return self.model.config.hidden_size

    def encode(
        self, texts: Iterable[str] | str, *, max_tokens_per_batch: int | None = None, progress: bool = False
    ) -> Tensor:
        """Vectors [N, C] of N texts, in their order, float32 on the CPU (of a single str: [C]).

        Args:
            texts: also an iterator, which is read a chunk at a time.
            max_tokens_per_batch: bound on the tokens computed at once; by default 2,048 on a CPU, 65,536 on a GPU.
                One text longer than that is a batch of its own.
            progress: show a bar of texts done.
        """
        from tqdm import tqdm

        if isinstance(texts, str):
            return self.encode([texts], max_tokens_per_batch=max_tokens_per_batch)[0]
        count = len(texts) if isinstance(texts, Sized) else None
        parts, done = [torch.empty(count or 0, self.dimension, dtype=torch.float32, device="cpu")], 0
        with tqdm(total=count, unit="text", disable=not progress) as bar:
            for part in self.encode_stream(texts, max_tokens_per_batch=max_tokens_per_batch):
                if count is None:
                    parts.append(part)
                else:  # written in place: joining the parts would hold every vector twice
                    parts[0][done : done + len(part)] = part
                done += len(part)
                bar.update(len(part))
        return parts[0] if count is not None else torch.cat(parts)

    def encode_stream(
        self,
        texts: Iterable[str],
        *,
        max_tokens_per_batch: int | None = None,
        chunk_size: int = CHUNK_TEXTS,
    ) -> Iterator[Tensor]:
        """Vectors of any number of texts in constant memory: yields [n, C] float32 on the CPU, in input order.

        Texts are sorted by length within chunks of `chunk_size`, so that a chunk's order, not the input's, decides
        what is computed together. While one chunk is computed the next one is tokenised, so `texts` is read one chunk
        ahead.
        """
        return self.encode_chunks(chunks_of(texts, chunk_size), max_tokens_per_batch=max_tokens_per_batch)

    def encode_chunks(
        self, chunks: Iterable[Sequence[str]], *, max_tokens_per_batch: int | None = None
    ) -> Iterator[Tensor]:
        """`encode_stream` of texts that are cut into chunks already: yields [n, C] for each chunk of n texts."""
        budget = self.token_budget(max_tokens_per_batch)
        for tokenised in one_ahead(self.tokenise, chunks):
            started = time.perf_counter()
            ids = tokenised()  # waits for the other thread where that is behind
            vectors = self.encode_ids(ids, budget)
            self.stats.seconds += time.perf_counter() - started
            yield vectors

    def token_budget(self, max_tokens_per_batch: int | None = None) -> int:
        """The bound on the tokens computed at once: as asked for, or the device's."""
        budget = max_tokens_per_batch or tokens_per_batch(self.device)
        if budget < 1:
            raise ValueError(f"max_tokens_per_batch must be at least 1, got {budget}")
        return budget

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts as the model reads them: with the prompt, lowered where asked for, cut to max_length."""
        texts = [self.prompt + text for text in texts] if self.prompt else texts
        texts = [text.lower() for text in texts] if self.lowercase else texts
        return self.tokenizer.input_ids(texts, self.max_length)

    def describe_operators(self) -> dict[str, tuple[str, str]]:
        """operator -> (implementation that would run it here, why)."""
        return describe_operators(self.device, self.model.impl)

    @torch.inference_mode()
    def encode_ids(self, ids: Sequence[Sequence[int]], budget: int) -> Tensor:
        """Vectors [n, C] float32 on the CPU of n tokenised texts, at most `budget` tokens at once."""
        lengths = [len(row) for row in ids]
        order = sorted(range(len(ids)), key=lengths.__getitem__, reverse=True)
        vectors = torch.empty(len(ids), self.dimension, dtype=torch.float32, device="cpu")

        @torch.inference_mode()  # a thread's own switch
        def encode(rows: list[int]) -> None:
            texts = [ids[row] for row in rows]
            tokens = sum(map(len, texts))
            missing = filling(tokens, min(budget, self.max_length), self.device)
            if missing and not self.model.takes_in_one_call(tokens):
                texts += [[0] * n for n in missing]
            batch = PackedBatch.from_lists(texts, device=self.device)
            vectors[rows] = self._vectors(batch)[: len(rows)].float().cpu()

        run_batches(encode, even_batches(order, lengths, budget, self.device), self.device)
        self.stats.texts += len(ids)
        self.stats.tokens += sum(lengths)
        for start in range(0, len(lengths), PADDED_BATCH):
            group = lengths[start : start + PADDED_BATCH]
            self.stats.padded_tokens += len(group) * max(group)
        return vectors

    def _vectors(self, batch: PackedBatch) -> Tensor:
        output = self.model(batch)
        if self.pooling == "pooler":
            pooled = output.pooler_output
        else:
            pooled = F.pool(output.last_hidden_state, batch.cu_seqlens, self.pooling, impl=self.model.impl)
        # normalised in float32, so that a vector's length is 1 to float32's precision whatever the model computes in
        return torch.nn.functional.normalize(pooled.float(), dim=-1) if self.normalize else pooled


def describe_operators(device: torch.device, impl: F.Impl | None = None) -> dict[str, tuple[str, str]]:
    """operator -> (implementation that would run it on this device, why)."""
    chosen = F.choose_impl(impl, device)
    if impl is not None:
        reason = "asked for"
    elif chosen == "native":
        reason = F.why_not_triton(device)
    else:
        reason = "a CUDA device" if device.type == "cuda" else "TRITON_INTERPRET=1"
    return dict.fromkeys(F.TRITON_MODULES, (chosen, reason))


def _keep_layers(model: BertModel, layer: int, pooling: str) -> None:
    """Drops the layers above hidden_states[layer], which nobody would read."""
    count = len(model.encoder["layer"])
    if not -count - 1 <= layer <= count:
        raise ValueError(f"layer must be {-count - 1} to {count} for a model of {count} layers, got {layer}")
    kept = layer if layer >= 0 else count + 1 + layer
    if kept != count and pooling == "pooler":
        raise ValueError(f'pooling "pooler" reads the last layer, so layer must be -1 or {count}, got {layer}')
    model.encoder["layer"] = model.encoder["layer"][:kept]
    if pooling != "pooler":
        model.pooler = None
