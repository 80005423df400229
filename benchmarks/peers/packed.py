"""transformers' BERT, and those encoders of others that leave the padding out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor

from ..harness.case import Missing, Run, need
from ..harness.jobs import Job, groups, padded_run
from ..harness.plain_bert import PlainBert


def their_config(job: Job, **more: Any) -> Any:
    """The job's configuration as transformers' class."""
    config, _ = job.model
    numbers = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    return need("transformers").BertConfig(**(numbers | more))


def their_model(job: Job, attention: str) -> torch.nn.Module:
    """transformers' BERT with the job's weights, shared by all rows with this attention."""

    def make() -> torch.nn.Module:
        transformers = need("transformers")
        config = their_config(job)
        config._attn_implementation = attention
        model = transformers.BertModel(config, add_pooling_layer=False)
        model.load_state_dict(job.model[1], strict=False)
        return model.to(job.device, job.dtype).eval()

    return job.once(("transformers", attention), make)


def need_flash_attn(job: Job, module: str = "flash_attn") -> Any:
    """The module, or Missing."""
    found = need("flash-attn", module)
    if job.device.type != "cuda":
        raise Missing("flash-attn needs a CUDA device")
    if job.dtype not in (torch.float16, torch.bfloat16):
        raise Missing("flash-attn computes in float16 and bfloat16 only")
    return found


def sentence_transformers(size: int, attention: str = "flash_attention_2") -> Callable[[Job], Run]:
    """What sentence-transformers does with attn_implementation="flash_attention_2": each batch becomes one sequence.

    Its Transformer module collates with `DataCollatorWithFlattening`, the attention is told where texts begin, and its
    Pooling sums flat. (Its tokeniser is left out here, as everybody's.)
    """

    def make(job: Job) -> Run:
        need("sentence-transformers")
        transformers = need("transformers")
        if attention == "flash_attention_2":
            need_flash_attn(job)
        modules = need("sentence-transformers", "sentence_transformers.sentence_transformer.modules")
        pooling = modules.Pooling(job.workload.model.hidden)
        collate = transformers.DataCollatorWithFlattening(
            return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
        )
        model = their_model(job, attention)
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


def flash_attn_bert(size: int) -> Callable[[Job], Run]:
    """flash-attention's own BERT, which takes the padding out after the embeddings; its fused layers where built."""

    def make(job: Job) -> Run:
        bert = need_flash_attn(job, "flash_attn.models.bert")
        config = their_config(
            job, use_flash_attn=True, position_embedding_type="absolute",
            fused_bias_fc=getattr(bert, "FusedDense", None) is not None,
            fused_dropout_add_ln=getattr(bert, "layer_norm_fn", getattr(bert, "layer_norm", None)) is not None,
        )  # fmt: skip
        model = bert.BertModel(config, add_pooling_layer=False)
        state = bert.remap_state_dict({f"bert.{name}": value for name, value in job.model[1].items()}, config)
        model.load_state_dict({name.removeprefix("bert."): value for name, value in state.items()})
        model.to(job.device, job.dtype).eval()
        return padded_run(lambda ids, mask: model(ids, attention_mask=mask.bool()).last_hidden_state, job, size, True)

    return make


def nested(size: int) -> Callable[[Job], Run]:
    """torch.nn.TransformerEncoder, whose fast path drops the padding into a nested tensor."""

    def make(job: Job) -> Run:
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

        return padded_run(call, job, size, True)

    return make
