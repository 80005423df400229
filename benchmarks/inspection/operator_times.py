"""Times each operator of a pass alone, with the model's shapes and layouts, and the pass as a whole.

The first layer represents all layers. Operators and the whole pass run in turns, with all batches one after the other
and without dropout. In training, a forward pass saves tensors for the backward pass, which then runs several times on
the same saved tensors. The loss computes its gradients in the forward pass, so its two directions are timed as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from fastbert import functional as F
from fastbert.config import BertConfig
from fastbert.layers import prepack
from fastbert.models.bert import BertModel
from fastbert.packing import PackedBatch
from fastbert.stack.shared import Pass
from fastbert.testing import Workload
from fastbert.text.batching import TOKENS_PER_BATCH, batches_within

from ..harness import timing, workloads
from ..harness.costs import BACKWARD, BOTH, FORWARD, masked

WHOLE = ("whole model", "")
Key = tuple[str, str]  # operator, direction
Run = Callable[[], object]


def batches_of(workload: Workload, device_type: str) -> list[Workload]:
    """The batches that an `Encoder` on this type of device makes of these texts: sorted by length, up to its budget."""
    lengths = sorted(workload.lengths, reverse=True)
    groups = batches_within(list(range(len(lengths))), lengths, TOKENS_PER_BATCH[device_type])
    return [Workload(workload.model, tuple(lengths[n] for n in group)) for group in groups]


def measure(
    batches: Sequence[Workload], device: torch.device, dtype: torch.dtype, training: bool, effort: timing.Effort
) -> dict[Key, list[float]]:
    """Operator and direction -> the times of all runs, each of one call for all batches; also for the whole pass."""
    model = _model(batches).to(device, dtype).train(training)
    if not training:
        prepack(model)  # an Encoder does this too
    of_batches = [_runs(model, batch, device, dtype, training) for batch in batches]
    whole = [_whole(model, batch, device, training) for batch in batches]
    runs = {key: _one_after_another([runs[key] for runs in of_batches]) for key in of_batches[0]}
    return timing.interleave({**runs, WHOLE: _one_after_another(whole)}, timing.Clock(device), effort)


def _one_after_another(runs: Iterable[Run]) -> Run:
    runs = list(runs)

    def run() -> None:
        for each in runs:
            each()

    return run


def _model(batches: Sequence[Workload]) -> BertModel:
    shape = batches[0].model
    config = BertConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.intermediate,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        max_position_embeddings=max(512, *(length for batch in batches for length in batch.lengths)),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return prepack(BertModel(config, add_pooling_layer=False))


def _packed(batch: Workload, device: torch.device) -> PackedBatch:
    return PackedBatch.from_lists(workloads.token_ids(batch.lengths, batch.model.vocab), device=device)


def _runs(
    model: BertModel, batch: Workload, device: torch.device, dtype: torch.dtype, training: bool
) -> dict[Key, Run]:
    """(operator, direction) -> a function that calls it."""
    made: dict[Key, Run] = {}
    packed = _packed(batch, device)
    shared = Pass(packed, packed.schedule(), None)
    layer = model.encoder["layer"][0]
    out, norm = layer.attention["output"]["dense"], layer.attention["output"]["LayerNorm"]
    up, down = layer.intermediate["dense"], layer.output["dense"]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_(training)

    def add(name: str, call: Callable[..., Tensor], *inputs: Tensor, parameters: Iterable[Tensor] = ()) -> None:
        made.update(_directions(name, call, inputs, [*inputs, *parameters], training))

    x, y = (random(batch.tokens, batch.model.hidden) for _ in range(2))
    add("embedding", lambda: model.embeddings(shared), parameters=model.embeddings.parameters())
    qkv = layer.attention["self"]
    add("qkv", lambda x: qkv(x, None), x, parameters=qkv.parameters())
    with torch.no_grad():  # strided views of one product, as the layer has them
        views = layer.qkv(x, None)
    q, k, v = (view.detach().requires_grad_(training) for view in views)
    add(
        "attention",
        lambda q, k, v: F.attention(q, k, v, packed.cu_seqlens, packed.max_seqlen, schedule=shared.schedule),
        q, k, v,
    )  # fmt: skip
    # in training the layer passes a product's bias to add_layer_norm
    bias, x_bias = (None, out.bias) if training else (out.bias, None)
    parameters = [out.weight] + ([] if training else [out.bias])
    add("attention out", lambda y: F.linear(y, out.weight, bias), y, parameters=parameters)
    add(
        "add_layer_norm",
        lambda y, x: F.add_layer_norm(y, x, norm.weight, norm.bias, norm.eps, x_bias=x_bias), y, x,
        parameters=[*norm.parameters(), *([out.bias] if training else [])],
    )  # fmt: skip
    down_bias = None if training else down.bias
    add(
        "feed_forward",
        lambda x: F.feed_forward(x, up.weight, up.bias, down.weight, down_bias, model.config.activation), x,
        parameters=[up.weight, up.bias, down.weight],
    )  # fmt: skip
    if not training:
        add("pool", lambda x: F.pool(x, packed.cu_seqlens), x)
        return made

    head, loss, parameters = _head(model)
    rows, labels = random(masked(batch.tokens), batch.model.hidden), _labels(batch, device)
    add("head", head, rows, parameters=parameters)
    table = model.embeddings.word_embeddings.weight

    def both() -> None:
        torch.autograd.grad(loss(rows, labels), [rows, table])

    made["loss", BOTH] = both
    return made


def _directions(name: str, call: Callable[..., Tensor], inputs, leaves: list[Tensor], training: bool) -> dict[Key, Run]:
    if not training:

        @torch.inference_mode()
        def forward() -> Tensor:
            return call(*inputs)

        return {(name, FORWARD): forward}

    kept = call(*inputs)
    upstream = torch.randn_like(kept)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(kept, leaves, upstream, retain_graph=True)

    return {(name, FORWARD): lambda: call(*inputs), (name, BACKWARD): backward}


def _labels(batch: Workload, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(batch.model.vocab, (masked(batch.tokens),), generator=generator).to(device)


def _head(model: BertModel) -> tuple[Callable, Callable, list[Tensor]]:
    """BERT's masked-word head, whose decoder is the word table: (function from hidden rows to the loss' input, function
    from that and labels to the loss, parameters of the first function)."""
    table = model.embeddings.word_embeddings.weight
    width = table.shape[1]
    dense, norm = (module.to(table.device, table.dtype) for module in (nn.Linear(width, width), nn.LayerNorm(width)))

    def head(rows: Tensor) -> Tensor:
        return F.add_layer_norm(F.linear_act(rows, dense.weight, dense.bias), None, norm.weight, norm.bias)

    def loss(rows: Tensor, labels: Tensor) -> Tensor:
        return F.linear_cross_entropy(rows, table, None, labels)

    return head, loss, [*dense.parameters(), *norm.parameters()]


def _whole(model: BertModel, batch: Workload, device: torch.device, training: bool) -> Run:
    packed = _packed(batch, device)

    @torch.inference_mode()
    def inference() -> Tensor:
        return F.pool(model(packed).last_hidden_state, packed.cu_seqlens)

    if not training:
        return inference
    head, loss, parameters = _head(model)
    labels = _labels(batch, device)
    parameters = [*model.parameters(), *parameters]
    chosen = torch.randperm(batch.tokens, generator=torch.Generator().manual_seed(3))[: len(labels)].to(device)

    def step() -> None:
        rows = model(packed).last_hidden_state[chosen]
        torch.autograd.grad(loss(head(rows), labels), parameters)

    return step
