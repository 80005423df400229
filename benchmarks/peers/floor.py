"""The floor of whole models: only their matrix products on the real tokens, by the vendor library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..harness.peer import FLOOR, PRODUCTS, EncoderPeer, Run, TrainingPeer
from .fastbert import encoder

if TYPE_CHECKING:
    from torch import Tensor

    from ..harness.jobs import Job


def _forward(job: Job) -> Run:
    """The forward pass, in the batches of an Encoder and as many at once; on a CPU with weights laid out beforehand."""
    import torch
    import torch.nn.functional as tf

    from fastbert.kernels.cpu import layouts
    from fastbert.text.batching import even_batches, run_batches

    config, state = job.model
    names = (
        "attention.self.query", "attention.self.key", "attention.self.value",
        "attention.output.dense", "intermediate.dense", "output.dense",
    )  # fmt: skip
    layers = []
    for n in range(config.num_hidden_layers):
        of_layer = (state[f"encoder.layer.{n}.{name}.weight"] for name in names)
        q, k, v, *rest = (weight.to(job.device, job.dtype, copy=True) for weight in of_layer)
        layers.append([torch.cat((q, k, v)), *rest])
        for weight in layers[-1]:
            layouts.mark(weight)
    lengths = [len(row) for row in job.rows]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batches = even_batches(order, lengths, encoder(job).token_budget(), job.device)
    tokens = [sum(lengths[n] for n in rows) for rows in batches]
    inputs = [torch.randn(t, config.hidden_size, device=job.device).to(job.dtype) for t in tokens]

    def product(x: Tensor, weight: Tensor) -> Tensor:
        packed = layouts.find(x, weight, None)
        return tf.linear(x, weight) if packed is None else layouts.linear(x, packed, None)

    @torch.inference_mode()  # each thread has to switch it on
    def multiply(batch: list[int]) -> None:
        x = inputs[batch[0]]
        for qkv, out, up, down in layers:
            product(x, qkv)
            product(product(product(x, out), up), down)

    def run() -> Tensor:
        run_batches(multiply, [[n] for n in range(len(inputs))], job.device)
        return inputs[-1]

    return run


def _step(job: Job) -> Run:
    """A training step: the products of forward and backward, and those of the labelled tokens' logits."""
    import torch

    from ..harness.steps import labelled

    m, n = job.workload.model, len(labelled(job)[0])
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


ENCODERS = (EncoderPeer(PRODUCTS, FLOOR, _forward, checked=False, package="torch"),)
TRAINING = (TrainingPeer(PRODUCTS, FLOOR, _step, checked=False, package="torch"),)
