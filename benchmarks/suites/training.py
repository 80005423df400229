"""One step of masked-word training: forward, loss at 15% of the tokens, backward, AdamW; a padded batch.

The learning rate is zero, so that every step does the same work on the same weights, and dropout is off, so that the
gradients can be compared. (Not the loss: in bfloat16 torch sums it in bfloat16, where its last bits are chance.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

import fastbert
from fastbert import functional as F
from fastbert.models.bert import BertModel
from fastbert.packing import PackedBatch

from ..harness import costs, workloads
from ..harness.case import OURS, Case, Row, Run, need
from ..harness.jobs import Job, head_of_masked_words
from ..peers import packed as peers_packed
from ..peers.encoder import FLOOR

# workload, priority, in --quick
CASES = (
    ("base_natural", 6, False),
    ("minilm_natural", 7, True),
    ("large_natural", 8, False),
    ("base_32x512", 46, False),
)
LATER = {"large_natural": 70}  # on a CPU
# Padded they are eight times as many, and the truth keeps activations of all in float32: some 50 GB.
GPU_TOKENS = {"base": 4096, "minilm": 8192, "large": 2048}


def _batch(job: Job) -> dict[str, Tensor]:
    ids, mask = workloads.padded(job.rows, torch.device("cpu"))
    chosen = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.15) & mask.bool()
    chosen[0, 1] = True  # a loss over nothing is NaN
    made = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(chosen, ids, -100)}
    return {name: t.to(job.device) for name, t in made.items()}


def _model(job: Job, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    transformers = need("transformers")
    if attention == "flash_attention_2":
        peers_packed.need_flash_attn(job)
    config = peers_packed.their_config(job, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertForMaskedLM(config).to(job.device, dtype).train()


def _stepping(model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype) -> Run:
    """A call that takes one step and gives the model, whose gradients stay where they are."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=dtype != torch.float64)

    def run() -> nn.Module:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
        return model

    return run


def _step(job: Job, change: Callable[[nn.Module], nn.Module], attention: str = "sdpa") -> Run:
    """transformers' model, changed, which then has the weights of all the others."""
    model, batch = _model(job, job.dtype, attention), _batch(job)
    model.load_state_dict({f"bert.{name}": value for name, value in job.model[1].items()}, strict=False)
    model.load_state_dict(head_of_masked_words(job.workload.model), strict=False)
    changed = change(model)
    return _stepping(model, lambda: changed(**batch).loss, job.dtype)


def _plain_step(job: Job, dtype: torch.dtype, change: Callable[[nn.Module], nn.Module]) -> Run:
    model, batch = job.plain_masked_lm(dtype), _batch(job)
    changed = change(model)
    return _stepping(model, lambda: changed(**batch), dtype)


class PackedMaskedLM(nn.Module):
    """fastbert's own model and operators: the mean loss of masked words of a packed batch, logits of those alone."""

    def __init__(self, job: Job):
        super().__init__()
        config, state = job.model
        config = replace(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.bert.load_state_dict(state)
        width = config.hidden_size
        transform = {"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=config.layer_norm_eps)}
        head = nn.ModuleDict({"transform": nn.ModuleDict(transform)})
        head.register_parameter("bias", nn.Parameter(torch.zeros(config.vocab_size, dtype=torch.float32, device="cpu")))
        self.cls = nn.ModuleDict({"predictions": head})
        self.load_state_dict(head_of_masked_words(job.workload.model), strict=False)

    def forward(self, batch: PackedBatch, rows: Tensor, labels: Tensor) -> Tensor:
        """rows, labels [N]: which tokens of the batch are predicted, and what they are."""
        head = self.cls["predictions"]
        dense, norm = head["transform"]["dense"], head["transform"]["LayerNorm"]
        hidden = F.linear_act(self.bert(batch).last_hidden_state[rows], dense.weight, dense.bias)
        hidden = F.add_layer_norm(hidden, None, norm.weight, norm.bias, norm.eps)
        return F.linear_cross_entropy(hidden, self.bert.embeddings.word_embeddings.weight, head.bias, labels)


def _packed_step(job: Job) -> Run:
    model = PackedMaskedLM(job).to(job.device, job.dtype).train()
    batch = PackedBatch.from_lists(job.rows, device=job.device)
    rows, labels = _labelled(job)
    return _stepping(model, lambda: model(batch, rows, labels), job.dtype)


def _labelled(job: Job) -> tuple[Tensor, Tensor]:
    """[N] rows of the packed batch that have a label, and the labels."""
    batch = _batch(job)
    labels = batch["labels"][batch["attention_mask"].bool()]
    rows = (labels != -100).nonzero().squeeze(1)
    return rows, labels[rows]


def _floor(job: Job) -> Run:
    """The model's matrix products, forward and both of backward, on the real tokens, and those of the labelled tokens'
    logits, through the vendor's library, and nothing else."""
    m, n = job.workload.model, len(_labelled(job)[0])
    sizes = [(3 * m.hidden, m.hidden), (m.hidden, m.hidden), (m.intermediate, m.hidden), (m.hidden, m.intermediate)]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=job.dtype, device=job.device)

    layers = [[random(*size) for size in sizes] for _ in range(m.layers)]
    tokens = {width: random(job.workload.tokens, width) for width in {width for size in sizes for width in size}}
    head = [random(m.hidden, m.hidden), random(m.vocab, m.hidden)]
    words = {width: random(n, width) for width in (m.hidden, m.vocab)}

    def multiply(weight: Tensor, of: dict[int, Tensor]) -> None:
        x, dy = of[weight.shape[1]], of[weight.shape[0]]
        torch.mm(x, weight.T)
        torch.mm(dy, weight)
        torch.mm(dy.T, x)

    def run() -> Tensor:
        for layer in layers:
            for weight in layer:
                multiply(weight, tokens)
        for weight in head:
            multiply(weight, words)
        return words[m.hidden]

    return run


def _outputs(model: nn.Module) -> list[Tensor]:
    """The gradient of all parameters as one vector, in the order of their names, which all models share but for "bert."
    before those of the encoder."""
    named = {
        name.replace("/", ".").removeprefix("weights.").removeprefix("bert."): p for name, p in model.named_parameters()
    }
    return [torch.cat([named[name].grad.flatten() for name in sorted(named)])]


def _accelerated(model: nn.Module) -> nn.Module:
    fastbert.accelerate(model)
    return model


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for name, priority, in_quick in CASES:
        if quick and not in_quick:
            continue
        model = workloads.model_name(name)
        workload = workloads.fit(name, device, model, quick)
        if device.type == "cpu":  # a step costs three passes, and the masked words' logits
            priority = LATER.get(name, priority)
            workload = workloads.cut(workload, max(300, workload.tokens // 4))
        elif name.endswith("_natural"):
            workload = workloads.cut(workload, GPU_TOKENS[model])
        job = Job(workload, dtype, device)
        exact = torch.float64 if dtype == torch.float32 else torch.float32

        def reference(working: torch.dtype, job: Job = job) -> list[Tensor]:
            return _outputs(_plain_step(job, working, _as_it_is)())

        def row(label: str, peer: str, step: Callable[[], Run], **more) -> Row:
            return Row(label, peer, step, outputs=_outputs, **more)

        theirs, plain = functools.partial(_step, job), functools.partial(_plain_step, job, dtype)
        rows = [
            row("fastbert.accelerate", OURS, functools.partial(theirs, _accelerated)),
            row("fastbert, packed", OURS, functools.partial(_packed_step, job)),
            Row(FLOOR, "floor", functools.partial(_floor, job), checked=False, package="torch"),
            row("transformers sdpa", "transformers", functools.partial(theirs, _as_it_is)),
            row("plain torch sdpa", "torch", functools.partial(plain, _as_it_is)),
            row("torch.compile, transformers sdpa", "torch.compile", functools.partial(theirs, torch.compile),
                package="torch", slow=True),
            row("torch.compile, plain torch sdpa", "torch.compile", functools.partial(plain, torch.compile),
                package="torch", slow=True),
        ]  # fmt: skip
        if device.type == "cuda":
            flash = "flash_attention_2"
            step = functools.partial(theirs, _as_it_is, flash)
            rows.insert(4, row(f"transformers {flash}", "transformers", step, package="flash-attn"))
        yield Case(
            "training", name, rows, functools.partial(reference, exact), functools.partial(reference, dtype),
            workloads.model_name(name), None, "step", dtype, workloads.shape_of(workload), workload.tokens,
            3 * costs.encoder_flops(workload), None, priority, in_quick, floor=FLOOR,
        )  # fmt: skip
