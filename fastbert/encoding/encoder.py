"""Text in, vectors out: tokenise, sort by length, pack, run, pool, and give the vectors back in input order."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from .. import functional as F
from ..config import BertConfig
from ..inference.weights import prepack
from ..models.bert import BertModel, BertOutput
from ..packing import PackedBatch
from ..text.batching import CHUNK_TEXTS, chunks_of, even_batches, filling, one_ahead, run_batches, tokens_per_batch
from .assembly import POOLING, loaded_parts, plain_modules
from .devices import DTYPES, INT8, describe_operators, resolve_device, resolve_dtype
from .folder import LAST_STATE, NO_PROMPTS, POOLER, Output, SentenceConfig
from .layers import combined, combined_width, layer_numbers
from .modules import (
    LAYERS,
    VECTOR,
    Pooling,
    Router,
    SentenceModule,
    Size,
    WeightedLayerPooling,
    check_modules,
    is_normalised,
    kinds_of,
    modes_of,
    parts_of,
    run_modules,
)
from .parts import Parts, Wanted
from .stats import PADDED_BATCH, EncodeStats

if TYPE_CHECKING:  # callers that pass ids, such as the benchmarks, need no tokenizers library
    from ..text.tokenizer import Tokenizer

__all__ = ["DTYPES", "INT8", "PADDED_BATCH", "POOLING", "EncodeStats", "Encoder", "SentenceConfig",
           "describe_operators", "resolve_device", "resolve_dtype"]  # fmt: skip


class Encoder:
    """A BERT that turns texts into vectors.

        encoder = Encoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
        vectors = encoder.encode(["A man is eating.", "Ein Mann isst."])    # [2, 384] float32

    Args:
        model: in evaluation mode, on the device and in the dtype to use.
        tokenizer: makes the model's ids.
        pooling: how a text's token vectors become one: mean, cls (the first), max, mean_sqrt_len_tokens, weightedmean
            or lasttoken; or pooler (BERT's own: tanh of a linear layer of the first).
        normalize: divide each vector by its L2 norm.
        max_length: longest text in tokens, [CLS] and [SEP] included; longer texts are cut.
        lowercase: lower-case the text before the tokenizer's own steps; added tokens in the text are not changed.
        prompt: put before every text, unless a call names another.
        prompts: name -> prompt.
        modules: steps after BERT, in place of `pooling` and `normalize`.
        output: the output of BERT that `modules` start from.
        output_hidden_states: whether every layer's output is passed to a `WeightedLayerPooling` among the modules.
        max_lengths: task -> longest text, in place of max_length.
        layers, combine: see `asked`.
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
        prompts: Mapping[str, str] | None = None,
        modules: Sequence[SentenceModule] | None = None,
        output: Output | None = None,
        output_hidden_states: bool = False,
        max_lengths: Mapping[str, int] | None = None,
        layers: Sequence[int] | None = None,
        combine: str | None = None,
    ):
        if modules is None:
            modules, output = plain_modules(pooling, normalize)
        output = output or LAST_STATE
        if "pooler_output" in output.keys and model.pooler is None:
            raise ValueError('pooling "pooler" needs a model with a pooler; this one has none')
        longest = model.config.max_position_embeddings
        max_length = min(longest, tokenizer.model_max_length or longest) if max_length is None else max_length
        if not 2 <= max_length <= longest:
            raise ValueError(f"max_length must be 2 to {longest} (the position table), got {max_length}")
        self.model, self.max_length = model, max_length
        self.max_lengths = {task: min(length, longest) for task, length in (max_lengths or {}).items()}
        self.lowercase, self.tokenizer = lowercase, tokenizer
        self._tokenizer = tokenizer.lowercased() if lowercase else tokenizer
        self.prompt, self.prompts = prompt, dict(NO_PROMPTS if prompts is None else prompts)
        self.task: str | None = None
        self.output = output
        self.modules = nn.ModuleList(modules).to(model.device, torch.promote_types(model.dtype, torch.float32)).eval()
        self._reads_layers = output_hidden_states and bool(parts_of(modules, WeightedLayerPooling))
        self._read(layers, combine)
        self.stats = EncodeStats()
        prepack(model)

    def _read(self, layers: Sequence[int] | None, combine: str | None) -> None:
        """Sets which layers are read, and the widths of a token's row and of a text's vector."""
        if combine is not None and layers is None:
            raise ValueError(f"combine {combine!r} is for several layers: name them with layers")
        width, count = self.model.config.hidden_size, len(cast(nn.ModuleList, self.model.encoder["layer"]))
        self.layers, self.combine = None, combine or "concat"
        if layers is not None:
            if self.output != LAST_STATE or self._reads_layers:
                raise ValueError("layers cannot be chosen: the model's pooling or modules say which ones are read")
            self.layers = layer_numbers(layers, count)
            width = combined_width(width, len(self.layers), self.combine)
        self.token_dimension = width
        sizes = {self.output.name: Size("text" if "pooler_output" in self.output.keys else "token", width)}
        if self._reads_layers:
            sizes[LAYERS] = Size("token", count + 1)
        check_modules(self.modules, sizes)
        if VECTOR not in sizes or sizes[VECTOR].row != "text":
            kinds = ", ".join(kinds_of(self.modules)) or "there is none"
            raise ValueError(f"no module makes a vector of a text: {kinds}")
        self._dimension = sizes[VECTOR].width

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
        truncate_dim: int | None = None,
        prompt_name: str | None = None,
        task: str | None = None,
        layers: Sequence[int] | None = None,
        combine: str | None = None,
    ) -> Encoder:
        """Loads a BERT from a folder or hub id: of sentence-transformers (modules.json), plain, or in another format.

        Args:
            pooling, normalize, max_length: None takes the folder's setting (plain BERT: mean, not normalised). A
                pooling replaces the folder's, if the folder has no other modules than a Pooling and a Normalize.
            layer: the layer whose output is pooled: 0 is the embeddings, 1 the first layer, -1 the last, as an index
                into hidden_states. Layers above it are not loaded.
            dtype: auto, float32, bfloat16, float16 or int8. auto is bfloat16 where the hardware multiplies it, float16
                on GPUs that multiply only that fast (V100, T4), else float32. int8, on a CPU with VNNI or AMX,
                multiplies 8-bit weights by 8-bit activations; everything else is computed as with auto.
            device: auto, cpu, cuda, ... On a CPU weights go into large pages: see `fastbert.inference.large_pages`.
            impl: see `fastbert.functional`.
            cuda_graphs: replay recorded launches for short batches: see `BertModel.use_cuda_graphs`. None does so on
                CUDA devices with the Triton kernels. That is safe, since an Encoder takes no gradients, and a recording
                is dropped when a weight or a hook of the model changes. False never does.
            truncate_dim: how many numbers of each vector are kept, before normalize; None takes the folder's setting.
            prompt_name, task, layers, combine: defaults for calls that name none; see `asked`. Layers above the highest
                of `layers` are not loaded.

        Raises: CheckpointError and ValueError, with messages of one line.
        """
        model, tokenizer, options = loaded_parts(
            id_or_path, pooling=pooling, normalize=normalize, layer=layer, dtype=dtype, device=device,
            max_length=max_length, impl=impl, cuda_graphs=cuda_graphs, truncate_dim=truncate_dim, layers=layers,
        )  # fmt: skip
        encoder = cls(model, tokenizer, **options, combine=combine)
        return encoder.asked(prompt_name=prompt_name, task=task)

    @property
    def config(self) -> BertConfig:
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
        return self._dimension

    @property
    def pooling(self) -> str:
        """Names of the poolings, joined by +; "pooler" for BERT's own; empty if they are on the routes of a Router."""
        return "pooler" if self.output == POOLER else modes_of(self.modules)

    @property
    def normalize(self) -> bool:
        """Whether every vector has length 1."""
        return is_normalised(self.modules)

    def asked(
        self,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        task: str | None = None,
        layers: Sequence[int] | None = None,
        combine: str | None = None,
    ) -> Encoder:
        """An Encoder with this prompt, task and layers as defaults: a copy that shares the model and the counts, or
        this Encoder if nothing is given.

        Args:
            prompt, prompt_name: what is put before every text, or its name among `prompts`; the former overrides.
            task: chooses the route of a Router, and the longest text if the model has one for each task.
            layers: the layers whose outputs make a token's row, instead of only the last one. Numbers are indices into
                hidden_states: 0 is the embeddings, 1 the first layer, -1 the last.
            combine: "concat" puts the layers' rows side by side (the default), "sum" adds them, "mean" averages them.

        Raises: ValueError for a name, a task or a layer that the model does not have.
        """
        if prompt is None and prompt_name is not None:
            if prompt_name not in self.prompts:
                raise ValueError(f"there is no prompt {prompt_name!r}; prompts are {', '.join(self.prompts)}")
            prompt = self.prompts[prompt_name]
        if prompt is task is layers is combine is None:
            return self
        encoder = copy.copy(self)
        if layers is not None or combine is not None:
            own = None if self.layers is None else self.combine
            encoder._read(self.layers if layers is None else layers, own if combine is None else combine)
        encoder.prompt = self.prompt if prompt is None else prompt
        encoder.task = self.task if task is None else task
        for module in self.modules:
            if isinstance(module, Router):
                module.route(encoder.task)
        return encoder

    def encode(
        self,
        texts: Iterable[str] | str,
        *,
        max_tokens_per_batch: int | None = None,
        progress: bool = False,
        prompt: str | None = None,
        prompt_name: str | None = None,
        task: str | None = None,
        layers: Sequence[int] | None = None,
        combine: str | None = None,
    ) -> Tensor:
        """Vectors [N, C] of N texts, in input order, float32 on the CPU ([C] for a single str).

        Args:
            texts: may be an iterator, which is read a chunk at a time.
            max_tokens_per_batch: bound on the tokens computed at once; by default 2,048 on a CPU, 65,536 on a GPU.
                One text longer than that is a batch of its own.
            progress: show a bar of texts done.
            prompt, prompt_name, task, layers, combine: see `asked`.
        """
        from tqdm import tqdm

        encoder = self.asked(prompt=prompt, prompt_name=prompt_name, task=task, layers=layers, combine=combine)
        if isinstance(texts, str):
            return encoder.encode([texts], max_tokens_per_batch=max_tokens_per_batch)[0]
        count = len(texts) if isinstance(texts, Sized) else None
        parts, done = [torch.empty(count or 0, encoder.dimension, dtype=torch.float32, device="cpu")], 0
        with tqdm(total=count, unit="text", disable=not progress) as bar:
            for part in encoder.encode_stream(texts, max_tokens_per_batch=max_tokens_per_batch):
                if count is None:
                    parts.append(part)
                else:  # written in place: joining the parts would hold every vector twice
                    parts[0][done : done + len(part)] = part
                done += len(part)
                bar.update(len(part))
        return parts[0] if count is not None else torch.cat(parts)

    def encode_query(
        self, texts: Iterable[str] | str, *, prompt: str | None = None, prompt_name: str | None = None, **options
    ) -> Tensor:
        """`encode` for queries: with task "query", and the prompt "query" unless another is named."""
        name = self._first_prompt(prompt, prompt_name, "query")
        return self.encode(texts, prompt=prompt, prompt_name=name, task="query", **options)

    def encode_document(
        self, texts: Iterable[str] | str, *, prompt: str | None = None, prompt_name: str | None = None, **options
    ) -> Tensor:
        """`encode` for documents that are searched: with task "document", and the first prompt there is of "document",
        "passage" and "corpus", unless another is named."""
        name = self._first_prompt(prompt, prompt_name, "document", "passage", "corpus")
        return self.encode(texts, prompt=prompt, prompt_name=name, task="document", **options)

    def _first_prompt(self, prompt: str | None, prompt_name: str | None, *names: str) -> str | None:
        if prompt is not None or prompt_name is not None:
            return prompt_name
        return next((name for name in names if name in self.prompts), None)

    def encode_stream(
        self,
        texts: Iterable[str],
        *,
        max_tokens_per_batch: int | None = None,
        chunk_size: int = CHUNK_TEXTS,
    ) -> Iterator[Tensor]:
        """Vectors of any number of texts in constant memory: yields [n, C] float32 on the CPU, in input order.

        Texts are sorted by length within chunks of `chunk_size` before they are put into batches. While one chunk is
        computed, the next one is tokenised, so `texts` is read one chunk ahead.
        """
        return self.encode_chunks(chunks_of(texts, chunk_size), max_tokens_per_batch=max_tokens_per_batch)

    def encode_chunks(
        self, chunks: Iterable[Sequence[str]], *, max_tokens_per_batch: int | None = None
    ) -> Iterator[Tensor]:
        """`encode_stream` of texts that come in chunks: yields [n, C] for each chunk of n texts."""
        budget = self.token_budget(max_tokens_per_batch)
        for tokenised in one_ahead(self.tokenise, chunks):
            started = time.perf_counter()
            ids = tokenised()  # waits until the other thread is done
            vectors = self.encode_ids(ids, budget)
            self.stats.seconds += time.perf_counter() - started
            yield vectors

    def encode_tokens(
        self,
        texts: Sequence[str] | str,
        *,
        words: str | None = None,
        special_tokens: bool = False,
        layers: Sequence[int] | None = None,
        combine: str | None = None,
        max_tokens_per_batch: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> list[Parts] | Parts:
        """Vectors of every token or every word of each text (one Parts for a single str): BERT's hidden states, without
        pooling, normalisation and other modules.

            parts, offsets, vectors = encoder.encode_tokens("Ada wrote it.", layers=[9, 10, 11, 12])

        Args:
            words: None for tokens; "first": a word's vector is that of its first token; "mean": the mean of its tokens.
                Words are the tokenizer's: BERT's end at white space and punctuation.
            special_tokens: also [CLS] and [SEP]; only with words=None.
            layers, combine, prompt, prompt_name: see `asked`. Tokens that begin in a prompt get no vectors.

        Tokens past the longest length get no vectors, nor do words that are partly cut off.
        """
        wanted, started = Wanted(words, special_tokens), time.perf_counter()
        encoder = self.asked(prompt=prompt, prompt_name=prompt_name, layers=layers, combine=combine)
        single, texts = isinstance(texts, str), [texts] if isinstance(texts, str) else texts
        given = [encoder.prompt + text for text in texts]
        encodings = encoder._tokenizer(given, max_length=encoder._limit()).encodings
        states = encoder.states([e.ids for e in encodings], encoder.token_budget(max_tokens_per_batch))
        of_all = zip(texts, encodings, states, strict=True)
        found = [wanted.of(text, e, len(encoder.prompt), of_text) for text, e, of_text in of_all]
        self.stats.seconds += time.perf_counter() - started
        return found[0] if single else found

    def token_budget(self, max_tokens_per_batch: int | None = None) -> int:
        """The bound on the tokens computed at once: the argument, or the device's default."""
        budget = max_tokens_per_batch or tokens_per_batch(self.device)
        if budget < 1:
            raise ValueError(f"max_tokens_per_batch must be at least 1, got {budget}")
        return budget

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts, with the prompt, lower-cased if set, cut to the longest length."""
        texts = [self.prompt + text for text in texts] if self.prompt else texts
        return self._tokenizer.input_ids(texts, self._limit())

    def _limit(self) -> int:
        """The longest text, in tokens."""
        return self.max_lengths.get(self.task or "", self.max_length)

    def _prompt_length(self) -> int:
        """Tokens of the prompt at the start of each text, [CLS] included; 0 without one, or if it is pooled too."""
        if not self.prompt or all(pooling.include_prompt for pooling in parts_of(self.modules, Pooling)):
            return 0
        (ids,) = self._tokenizer.input_ids([self.prompt], self.max_length)
        return len(ids) - (ids[-1] in self.tokenizer.special_ids)

    def describe_operators(self) -> dict[str, tuple[str, str]]:
        """operator -> (implementation that would run it here, why)."""
        return describe_operators(self.device, self.model.impl)

    def encode_ids(self, ids: Sequence[Sequence[int]], budget: int) -> Tensor:
        """Vectors [n, C] float32 on the CPU of n tokenised texts, at most `budget` tokens at once."""
        vectors = torch.empty(len(ids), self.dimension, dtype=torch.float32, device="cpu")

        def keep(rows: list[int], batch: PackedBatch) -> None:
            # A single row is indexed by an int: a list would become a tensor first, which takes longer than the copy.
            vectors[rows if len(rows) > 1 else rows[0]] = self._vectors(batch)[: len(rows)].float().cpu()

        self._run(ids, budget, keep)
        return vectors

    def states(self, ids: Sequence[Sequence[int]], budget: int) -> list[Tensor]:
        """A row [tokens, C] float32 on the CPU for each token of tokenised texts, at most `budget` tokens at once."""
        of_texts: dict[int, Tensor] = {}

        def keep(rows: list[int], batch: PackedBatch) -> None:
            found = self.model(batch, output_hidden_states=self.layers is not None)
            states = self._rows(found).float().cpu()
            for row, of_text in zip(rows, states.split(batch.lengths), strict=False):  # a filler sequence may follow
                of_texts[row] = of_text

        self._run(ids, budget, keep)
        return [of_texts[row] for row in range(len(ids))]

    @torch.inference_mode()
    def _run(self, ids: Sequence[Sequence[int]], budget: int, keep: Callable[[list[int], PackedBatch], None]) -> None:
        """Calls keep(rows, batch) for batches of all texts. A batch may end with a filler sequence of no row."""
        lengths = [len(row) for row in ids]
        order = sorted(range(len(ids)), key=lengths.__getitem__, reverse=True)
        reads_layers = self._reads_layers or self.layers is not None

        @torch.inference_mode()  # the mode belongs to a thread, and batches may be computed by other threads
        def encode(rows: list[int]) -> None:
            texts = [ids[row] for row in rows]
            tokens = sum(map(len, texts))
            missing = filling(tokens, min(budget, self.max_length), self.device)
            if missing and (reads_layers or not self.model.takes_in_one_call(tokens)):
                texts += [[0] * n for n in missing]
            keep(rows, PackedBatch.from_lists(texts, device=self.device))

        run_batches(encode, even_batches(order, lengths, budget, self.device), self.device)
        self.stats.count(lengths)

    def _rows(self, found: BertOutput) -> Tensor:
        """[T, C]: the last layer's output, or the combined outputs of `layers`."""
        if self.layers is None:
            return found.last_hidden_state
        assert found.hidden_states is not None  # they were asked for
        return combined([found.hidden_states[number] for number in self.layers], self.combine)

    def _vectors(self, batch: PackedBatch) -> Tensor:
        found = self.model(batch, output_hidden_states=self._reads_layers or self.layers is not None)
        rows = reduce(getitem, self.output.keys, found) if self.layers is None else self._rows(found)
        outputs = {self.output.name: rows} | ({LAYERS: found.hidden_states} if self._reads_layers else {})
        return run_modules(
            self.modules, batch, outputs, prompt_length=self._prompt_length(), task=self.task, impl=self.model.impl
        )
