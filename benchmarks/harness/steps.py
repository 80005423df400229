"""One step of masked-word training by any library: the batch, its labels, the optimiser, and the gradients; and its
floor, the products of the linear layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastbert.testing import ModelShape

from .jobs import Job
from .peer import Run
from .workloads import padded


def batch_of(job: Job) -> dict[str, Tensor]:
    ids, mask = padded(job.rows, torch.device("cpu"))
    chosen = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.15) & mask.bool()
    chosen[0, 1] = True  # a loss over nothing is NaN
    made = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(chosen, ids, -100)}
    return {name: t.to(job.device) for name, t in made.items()}


def stepping(model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype) -> Run:
    """A function that does one step and returns the model with its gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=dtype != torch.float64)

    def run() -> nn.Module:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
        return model

    return run


def labelled(job: Job) -> tuple[Tensor, Tensor]:
    """[N] rows of the packed batch that have a label, and the labels."""
    batch = batch_of(job)
    labels = batch["labels"][batch["attention_mask"].bool()]
    rows = (labels != -100).nonzero().squeeze(1)
    return rows, labels[rows]


def gradients(model: nn.Module) -> list[Tensor]:
    """The gradient of all parameters but the table of token types as one vector, and that of this table.

    Parameters are in the order of their names, which all models share but for "bert." before those of the encoder. On
    a CPU torch adds up an embedding's gradient in the table's dtype, and all tokens have type 0. In bfloat16 that sum
    has an error of 15% (972 tokens), which would hide errors of all other parameters.
    """
    named = {
        name.replace("/", ".").removeprefix("weights.").removeprefix("bert."): p for name, p in model.named_parameters()
    }
    alone = "embeddings.token_type_embeddings.weight"
    others = torch.cat([named[name].grad.flatten() for name in sorted(named) if name != alone])
    return [others, named[alone].grad.flatten()]


def linear_products(shape: ModelShape, dtype: torch.dtype, most: int, most_guessed: int) -> Callable[[int, int], None]:
    """A function of a step's number of tokens and of how many of them are guessed. It computes, on random numbers, the
    three matrix products of every linear layer (the outputs, the gradients of inputs and those of weights), those of
    the head of masked words too where any token is guessed. Products within attention are not among them.

    most, most_guessed: the largest of both numbers that the function will be given.
    """

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float32, device="cpu").to(dtype)

    sizes = [(3 * shape.hidden, shape.hidden), (shape.hidden, shape.hidden)]
    sizes += [(shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)]
    layers = [[random(*size) for size in sizes] for _ in range(shape.layers)]
    of_words = [random(shape.hidden, shape.hidden), random(shape.vocab, shape.hidden)]
    inputs = {width: random(most, width) for size in sizes for width in size}
    logits = random(most_guessed, shape.vocab)

    def multiply(weight: Tensor, x: Tensor, dy: Tensor) -> None:
        torch.mm(x, weight.t())
        torch.mm(dy, weight)
        torch.mm(dy.t(), x)

    def compute(tokens: int, guessed: int) -> None:
        of_width = {width: x[:tokens] for width, x in inputs.items()}
        for weight in (weight for weights in layers for weight in weights):
            multiply(weight, of_width[weight.shape[1]], of_width[weight.shape[0]])
        if guessed:
            x = inputs[shape.hidden][:guessed]
            multiply(of_words[0], x, x)
            multiply(of_words[1], x, logits[:guessed])

    return compute
