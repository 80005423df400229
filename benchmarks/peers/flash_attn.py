"""flash-attention: its kernel for packed batches, its own BERT, and transformers' BERT with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..harness.peer import GPU_ONLY, AttentionPeer, EncoderPeer, Missing, Prepared, Run, TrainingPeer, need
from . import transformers

if TYPE_CHECKING:
    from ..harness.jobs import Job

PEER = "flash-attn"


def module_for(job: Job, module: str = "flash_attn") -> Any:
    """The module, or Missing."""
    import torch

    found = need(PEER, module)
    if job.device.type != "cuda":
        raise Missing("flash-attn needs a CUDA device")
    if job.dtype not in (torch.float16, torch.bfloat16):
        raise Missing("flash-attn computes in float16 and bfloat16 only")
    return found


def _varlen(inputs: dict[str, Any]) -> Prepared:
    attend = need(PEER, "flash_attn").flash_attn_varlen_func
    if inputs["q"].device.type != "cuda":
        raise Missing("flash-attn needs a CUDA device")
    cu, longest, p = inputs["cu_seqlens"], inputs["max_seqlen"], inputs.get("dropout_p", 0.0)
    return Prepared(lambda q, k, v: attend(q, k, v, cu, cu, longest, longest, dropout_p=p))


def bert(size: int) -> Callable[[Job], Run]:
    """flash-attention's own BERT, which removes the padding after the embeddings; with its fused layers if
    installed."""

    def make(job: Job) -> Run:
        from ..harness.jobs import padded_run

        theirs = module_for(job, "flash_attn.models.bert")
        config = transformers.config_of(
            job, use_flash_attn=True, position_embedding_type="absolute",
            fused_bias_fc=getattr(theirs, "FusedDense", None) is not None,
            fused_dropout_add_ln=getattr(theirs, "layer_norm_fn", getattr(theirs, "layer_norm", None)) is not None,
        )  # fmt: skip
        model = theirs.BertModel(config, add_pooling_layer=False)
        state = theirs.remap_state_dict({f"bert.{name}": value for name, value in job.model[1].items()}, config)
        model.load_state_dict({name.removeprefix("bert."): value for name, value in state.items()})
        model.to(job.device, job.dtype).eval()
        return padded_run(lambda ids, mask: model(ids, attention_mask=mask.bool()).last_hidden_state, job, size, True)

    return make


def _step(job: Job) -> Run:
    module_for(job)
    return transformers.step(job, attention="flash_attention_2")


ATTENTION = (AttentionPeer("flash-attn varlen", PEER, _varlen, devices=GPU_ONLY),)
ENCODERS = (EncoderPeer("flash-attn BERT, packed, sorted, batches of 128", PEER, bert(128), GPU_ONLY),)
TRAINING = (TrainingPeer("transformers flash_attention_2", "transformers", _step, PEER, GPU_ONLY),)
