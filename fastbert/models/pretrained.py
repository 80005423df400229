"""What an encoder has beside its layers: reading and saving, checks and packing of its input, recordings on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from typing_extensions import Self

from .. import checkpoint
from .. import functional as F
from ..config import BertConfig
from ..inference.eight_bits import put_in_integers
from ..inference.graphs import Graphs, graphs_for, why_not_recorded
from ..packing import PackedBatch
from .loading import LeftUninitialised, load_encoder, read_model


class PretrainedEncoder(nn.Module):
    """The base of `BertModel`. A subclass has `embeddings` and runs its layers in `_run`."""

    embeddings: Any  # a `BertEmbeddings`
    _run: Callable[..., Tensor]

    def __init__(self, config: BertConfig, impl: F.Impl | None):
        super().__init__()
        self.config, self.impl = config, impl
        self.graphs: Graphs | None = None
        self.checkpointing: dict[str, Any] | None = None  # options of torch's checkpoint

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        impl: F.Impl | None = None,
        add_pooling_layer: bool | None = None,
    ) -> Self:
        """Weights and config from a local folder or a hub id, or from another format; in evaluation mode.

        Args:
            id_or_path: a folder, a hub id, or any checkpoint that `fastbert convert` reads. A TensorFlow checkpoint is
                memory-mapped; its matrices, which are stored transposed, are copied.
            dtype: of the parameters; None keeps the checkpoint's.
            add_pooling_layer: None adds a pooler if the checkpoint has one.

        Weights outside the encoder are left out, as by transformers' AutoModel; a warning names them, unless they
        belong to a head of transformers' BERT classes. DataParallel's prefix "module." is removed from names. Layers
        whose weights are stored in 8 bits multiply these integers if this CPU can, else they are dequantised.
        Raises: CheckpointError, which names weights that are missing, duplicate, or of the wrong shape.
        """
        read = read_model(id_or_path)
        config, state = read.config, read.state
        if add_pooling_layer is None:
            add_pooling_layer = any("pooler.dense.weight" in name for name in state)
        with torch.device("meta"), LeftUninitialised():
            model = cls(config, add_pooling_layer, impl)  # type: ignore[call-arg, arg-type]  # a subclass's
        load_encoder(model, state, id_or_path)
        put_in_integers(model, read.integers, device, impl)
        return model.to(device=device, dtype=read.dtype(dtype)).eval()

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes config.json and model.safetensors, as transformers reads them.

        state_dict: by default the model's own; the whole one of a sharded model.
        """
        self.config.save_pretrained(folder)
        checkpoint.save_state_dict(folder, self.state_dict() if state_dict is None else state_dict)

    def use_cuda_graphs(self, on: bool = True) -> Self:
        """Turns CUDA graphs for short batches on or off; returns the model.

        There is one recording for each bucket of total tokens, made when a batch first needs it. The largest bucket has
        4,096 tokens, and more if the model is narrower than BERT-base: see `fastbert.inference.graphs.most_tokens`.
        Recordings serve calls in evaluation mode, without gradients, with ids, and without attentions and hidden
        states; other calls run without them. A recording is dropped when a parameter changes. `self.graphs.calls`
        counts the calls.

        Raises: ValueError if the model is not on a CUDA device.
        """
        self.graphs = graphs_for(self, self.impl) if on else None
        return self

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.checkpointing is not None

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """In training, keeps only each layer's input, and computes the layer once more in the backward pass. This saves
        memory and costs one more forward pass. Dropout is drawn from a seed, so gradients are the same to the bit.

        gradient_checkpointing_kwargs: options of torch.utils.checkpoint.checkpoint, by default use_reentrant=False.
        """
        self.checkpointing = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}

    def gradient_checkpointing_disable(self) -> None:
        self.checkpointing = None

    @property
    def device(self) -> torch.device:
        return self.embeddings.word_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.word_embeddings.weight.dtype

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def pack(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> PackedBatch:
        """The packed batch of a padded batch's real tokens; arguments and errors as in `forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given = inputs_embeds if input_ids is None else input_ids
        if given.dim() != (2 if inputs_embeds is None else 3):
            raise ValueError(f"input_ids must be [B, S] (inputs_embeds [B, S, C]), got {tuple(given.shape)}")
        if given.shape[1] > self.config.max_position_embeddings and position_ids is None:
            raise ValueError(
                f"sequences of {given.shape[1]} tokens are longer than the position table "
                f"({self.config.max_position_embeddings}); truncate them"
            )
        if inputs_embeds is not None and attention_mask is None and token_type_ids is None and position_ids is None:
            attention_mask = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
        return PackedBatch.from_padded(
            input_ids, attention_mask, token_type_ids, position_ids, shape=(given.shape[0], given.shape[1])
        )

    def _check(self, batch: PackedBatch) -> None:
        """Raises ValueError if lengths do not fit or ids are out of range; skipped where it would wait for a device."""
        F.expect_sequences("BertModel", "cu_seqlens", batch.cu_seqlens, batch.total_tokens, batch.max_seqlen)
        for name, ids, size in (
            ("token ids", batch.input_ids, self.config.vocab_size),
            ("segments", batch.token_type_ids, self.config.type_vocab_size),
            ("positions", batch.positions, self.config.max_position_embeddings),
        ):
            if ids is not None:
                F.expect_indices("BertModel", name, ids, size)

    def _replayed(self, batch: PackedBatch) -> Tensor | None:
        """x [T, C] by a recording, or None if this call runs without recordings."""
        graphs = self.graphs
        if graphs is None or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        reason = graphs.why_not(batch.positions.device, batch.total_tokens)
        if reason is None and not graphs.is_same():
            reason = why_not_recorded(self)
        if reason is not None:
            graphs.calls[reason] += 1
            return None
        return graphs.run(self, batch, lambda max_seqlen: self._run)
