"""Distances between a student and its teacher, as sums over rows of packed batches. The caller divides them.

Logits z of the student and u of the teacher, in rows; temperature t, q = softmax(z / t), p = softmax(u / t). The factor
t² keeps the size of the gradient (Hinton et al., arXiv:1503.02531):

    classes    t² sum(p (log p - log q))                     a row [K]
    several    the same of each label, p = sigmoid(u / t)    a row [K], the mean of its labels
    numbers    mean((z - u)²)                                a row [K]
    spans      classes over the tokens of a sequence         a sequence, half for starts and half for ends
    words      classes over the vocabulary                   a row of hidden states [C]

Hidden states x of the student and y of the teacher, in rows [C]:

    squared    mean((x - y)²)                  a row         TinyBERT, arXiv:1909.10351
    cosine     1 - x y / (|x| |y|)             a row         DistilBERT, arXiv:1910.01108
    unit       |x / |x| - y / |y||²            a row         PKD, arXiv:1908.09355

Two rows a, b [H, D] of each token of a sequence with n tokens, s = a bᵀ / sqrt(D) [H, n, n], of the teacher s':

    scores     mean over heads and keys of (s - s')²                        a token    TinyBERT
    relations  mean over heads of KL(softmax(s') || softmax(s)) over keys   a token    MiniLM, arXiv:2002.10957

Both compute one sequence at a time, and a long one in blocks of queries. Gradients are computed with each block, so
that its scores can be freed. All distances are computed in float32, or in float64 for float64 inputs. Gradients flow to
the student only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..models.head import at_least_float32

BLOCK_SCORES = 1 << 22  # most scores in a block, over all heads: 16 MB in float32
BLOCK_LOGITS = 1 << 23  # most logits in a block of words

# ---- logits ----------------------------------------------------------------------------------------------


def classes(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """logits, teacher [N, K]."""
    log_q = (at_least_float32(logits) / temperature).log_softmax(-1)
    log_p = (at_least_float32(teacher) / temperature).log_softmax(-1)
    return nnf.kl_div(log_q, log_p, reduction="sum", log_target=True) * temperature**2


def several(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """logits, teacher [N, K]: any number of labels in a row."""
    z, u = (at_least_float32(x) / temperature for x in (logits, teacher))
    # the two outcomes of a label are classes with the logits z and 0
    both, of_teacher = (torch.stack((x, torch.zeros_like(x)), -1) for x in (z, u))
    return classes(both, of_teacher, 1.0) * temperature**2 / logits.shape[-1]


def numbers(logits: Tensor, teacher: Tensor) -> Tensor:
    """logits, teacher [N, K]."""
    return squared(logits, teacher)


def spans(logits: Sequence[Tensor], teacher: Sequence[Tensor], lengths: Sequence[int], temperature: float) -> Tensor:
    """logits, teacher: (starts [T], ends [T]) of sequences of these lengths."""
    sums = [
        classes(of_student[None], of_teacher[None], temperature)
        for side in range(2)
        for of_student, of_teacher in zip(logits[side].split(lengths), teacher[side].split(lengths), strict=True)
    ]
    return torch.stack(sums).sum() / 2


class _Words(torch.autograd.Function):
    """logits = h weightᵀ + bias, in blocks of rows; d logits = t (q - p)."""

    @staticmethod
    def forward(ctx: Any, h, weight, bias, teacher_h, teacher_weight, teacher_bias, temperature):
        compute = torch.promote_types(h.dtype, torch.float32)
        total = torch.zeros((), dtype=compute, device=h.device)
        dh = torch.zeros(h.shape, dtype=compute, device=h.device)
        dweight = torch.zeros(weight.shape, dtype=compute, device=h.device)
        dbias = torch.zeros(bias.shape, dtype=compute, device=h.device)
        cast, teacher_cast = weight.to(h.dtype), teacher_weight.to(teacher_h.dtype)
        rows = max(1, BLOCK_LOGITS // weight.shape[0])
        for first in range(0, h.shape[0], rows):
            x, y = h[first : first + rows], teacher_h[first : first + rows]
            log_q = (((x @ cast.t()).to(compute) + bias) / temperature).log_softmax(-1)
            log_p = (((y @ teacher_cast.t()).to(compute) + teacher_bias) / temperature).log_softmax(-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            dlogits = log_q.exp_().sub_(p).mul_(temperature)
            dbias += dlogits.sum(0)
            dlogits = dlogits.to(h.dtype)
            dh[first : first + rows] = dlogits @ cast
            dweight += dlogits.t() @ x
        ctx.save_for_backward(dh, dweight, dbias)
        ctx.dtypes = h.dtype, weight.dtype, bias.dtype
        return total * temperature**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dtotal: Tensor):
        scaled = ((d * dtotal).to(dtype) for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return (*scaled, None, None, None, None)


def words(
    h: Tensor, weight: Tensor, bias: Tensor, teacher: tuple[Tensor, Tensor, Tensor], temperature: float
) -> Tensor:  # fmt: skip
    """h [N, C], weight [V, C] and bias [V] of the student. teacher: the same three of the teacher. Products are in the
    dtype of h."""
    return _Words.apply(h, weight, bias, *(t.detach() for t in teacher), temperature)


# ---- hidden states ---------------------------------------------------------------------------------------


def squared(x: Tensor, y: Tensor) -> Tensor:
    """x, y [N, C]."""
    return (at_least_float32(x) - at_least_float32(y)).square().mean(-1).sum()


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """x, y [N, C]."""
    return (1.0 - nnf.cosine_similarity(at_least_float32(x), at_least_float32(y), dim=-1)).sum()


def unit(x: Tensor, y: Tensor) -> Tensor:
    """x, y [N, C]."""
    x, y = (nnf.normalize(at_least_float32(t), dim=-1) for t in (x, y))
    return (x - y).square().sum()


# ---- pairs of tokens -------------------------------------------------------------------------------------


class _Pairwise(torch.autograd.Function):
    """da = ds b / sqrt(D);  db = dsᵀ a / sqrt(D)

    with the gradient of the scores ds [H, n, n] = 2 (s - s') / (H n) or (softmax(s) - softmax(s')) / H.
    """

    @staticmethod
    def forward(ctx: Any, a, b, teacher_a, teacher_b, lengths, kind):
        compute = torch.promote_types(a.dtype, torch.float32)
        total = torch.zeros((), dtype=compute, device=a.device)
        da = torch.zeros(a.shape, dtype=compute, device=a.device)
        db = torch.zeros(b.shape, dtype=compute, device=b.device)
        heads = a.shape[1]
        scale, teacher_scale = a.shape[2] ** -0.5, teacher_a.shape[2] ** -0.5
        for queries, keys in _blocks(lengths, heads):
            x, y, u, v = (
                t[rows].transpose(0, 1).to(compute)  # [H, rows, D]
                for t, rows in ((a, queries), (b, keys), (teacher_a, queries), (teacher_b, keys))
            )
            s = (x @ y.transpose(1, 2)) * scale
            of_teacher = (u @ v.transpose(1, 2)) * teacher_scale
            if kind == "scores":
                n = y.shape[1]
                ds = s.sub_(of_teacher)
                total += ds.square().sum() / (heads * n)
                ds = ds.mul_(2.0 / (heads * n))
            else:
                log_q, log_p = s.log_softmax(-1), of_teacher.log_softmax(-1)
                p = log_p.exp()
                total += (p * (log_p - log_q)).sum() / heads
                ds = log_q.exp_().sub_(p).div_(heads)
            da[queries] = (ds @ y).transpose(0, 1) * scale
            db[keys] += (ds.transpose(1, 2) @ x).transpose(0, 1) * scale
        ctx.save_for_backward(da, db)
        ctx.dtypes = a.dtype, b.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dtotal: Tensor):
        da, db = ((d * dtotal).to(dtype) for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return da, db, None, None, None, None


def _blocks(lengths: Sequence[int], heads: int) -> Iterator[tuple[slice, slice]]:
    """(queries, keys) as rows of the packed batch; the keys are all rows of the queries' sequence."""
    start = 0
    for n in lengths:
        rows = max(1, BLOCK_SCORES // max(1, heads * n))
        for first in range(start, start + n, rows):
            yield slice(first, min(first + rows, start + n)), slice(start, start + n)
        start += n


def pairwise(
    a: Tensor, b: Tensor, teacher: tuple[Tensor, Tensor], lengths: Sequence[int], kind: Literal["scores", "relations"]
) -> Tensor:
    """`scores` or `relations` of a, b [T, H, D] and the teacher's [T, H, D'], for sequences of these lengths.

    Raises: ValueError if the numbers of heads differ.
    """
    if a.shape[1] != teacher[0].shape[1]:
        raise ValueError(f"the student compares {a.shape[1]} heads, the teacher {teacher[0].shape[1]}")
    return _Pairwise.apply(a, b, teacher[0].detach(), teacher[1].detach(), lengths, kind)
