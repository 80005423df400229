"""torch.compile of operators in plain torch, of transformers' BERT, and of BERT in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..harness.peer import (
    CPU_ONLY,
    GPU_ONLY,
    AttentionPeer,
    EncoderPeer,
    Missing,
    OperatorPeer,
    Prepared,
    ProcessPeer,
    TrainingPeer,
    need,
)
from . import torch as plain_torch
from . import transformers

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..harness.jobs import Job

PEER, PACKAGE = "torch.compile", "torch"


def _flex(inputs: dict[str, Any]) -> Prepared:
    """torch's flex_attention, compiled, on the packed batch; a block mask limits attention to a token's sequence."""
    import torch

    flex = need("torch", "torch.nn.attention.flex_attention")
    if inputs.get("dropout_p"):
        raise Missing("flex_attention has no dropout")
    lengths, q = inputs["cu_seqlens"].diff().long(), inputs["q"]
    of = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths)
    tokens = q.shape[0]
    mask = flex.create_block_mask(
        lambda b, h, i, j: of[i] == of[j], None, None, tokens, tokens, device=q.device, _compile=q.device.type == "cuda"
    )
    attend = torch.compile(flex.flex_attention, dynamic=False) if q.device.type == "cuda" else flex.flex_attention
    return Prepared(
        lambda q, k, v: attend(q, k, v, block_mask=mask),
        lambda t: t.transpose(0, 1)[None].contiguous(),  # [1, H, T, D]
        lambda t: t[0].transpose(0, 1),
    )


ATTENTION = (AttentionPeer("torch flex, packed", PEER, _flex, PACKAGE, GPU_ONLY, slow=True),)


def _operator(plain: Callable[..., Tensor]) -> Callable[[Any], Callable[..., Tensor]]:
    def make(device: Any) -> Callable[..., Tensor]:
        import torch
        import torch._functorch.config  # torch does not import it by itself

        # The backward pass of one graph runs many times here, so it must not reuse the graph's buffers.
        torch._functorch.config.donated_buffer = False
        return torch.compile(plain, mode="max-autotune-no-cudagraphs" if device.type == "cuda" else None)

    return make


OPERATORS = {
    name: (OperatorPeer(PEER, PEER, _operator(plain), PACKAGE, slow=True),) for name, plain in plain_torch.PLAIN.items()
}


def _compiled(mode: str) -> Callable[[nn.Module, Job], nn.Module]:
    def change(model: nn.Module, job: Job) -> nn.Module:
        import torch

        # On a CPU weights are frozen, as torch's documentation advises for inference.
        options = torch._inductor.list_mode_options(mode) | {"freezing": job.device.type == "cpu"}
        return torch.compile(model, dynamic=len(job.rows) > 1, options=options)

    return change


def _transformers(size: int, mode: str = "default"):
    return transformers.padded("sdpa", size, True, _compiled(mode))


def _step_of(step: Callable[..., Any]) -> Callable[[Job], Any]:
    def make(job: Job) -> Any:
        import torch

        return step(job, torch.compile)

    return make


MAX_AUTOTUNE = "max-autotune-no-cudagraphs"
ENCODERS = (
    EncoderPeer("torch.compile, plain torch sdpa, sorted, batches of 32", PEER,
                plain_torch.plain(32, _compiled("default")), GPU_ONLY, package=PACKAGE, slow=True),
    EncoderPeer("torch.compile, frozen, transformers sdpa, sorted, batches of 4", PEER, _transformers(4), CPU_ONLY,
                package=PACKAGE, slow=True),
    EncoderPeer("torch.compile max-autotune, frozen, transformers sdpa, sorted, batches of 4", PEER,
                _transformers(4, MAX_AUTOTUNE), CPU_ONLY, package=PACKAGE, slow=True),
    EncoderPeer("torch.compile, transformers sdpa, sorted, batches of 32", PEER, _transformers(32), GPU_ONLY,
                package=PACKAGE, slow=True, single=False),
    EncoderPeer("torch.compile reduce-overhead, transformers sdpa", PEER, _transformers(1, "reduce-overhead"),
                GPU_ONLY, package=PACKAGE, slow=True, many=False),  # with CUDA graphs, as our row has
    EncoderPeer("torch.compile max-autotune, transformers sdpa, sorted, batches of 32", PEER,
                _transformers(32, MAX_AUTOTUNE), GPU_ONLY, package=PACKAGE, slow=True, single=False),
)  # fmt: skip
TRAINING = (
    TrainingPeer("torch.compile, transformers sdpa", PEER, _step_of(transformers.step), PACKAGE, slow=True),
    TrainingPeer("torch.compile, plain torch sdpa", PEER, _step_of(plain_torch.step), PACKAGE, slow=True),
)


def _compiled_weights(files: Any) -> dict[str, Any]:
    return {**transformers.weights(files), "compile": True}


PROCESSES = (
    ProcessPeer("torch.compile, transformers sdpa, empty cache", PEER, transformers.__name__, _compiled_weights,
                package=PACKAGE, slow=True, cache=transformers.caches, empty=True, suites=("cold",)),
    ProcessPeer("torch.compile, transformers sdpa", PEER, transformers.__name__, _compiled_weights,
                package=PACKAGE, slow=True, cache=transformers.caches),
)  # fmt: skip
