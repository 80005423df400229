"""Cross-entropy of a linear layer's outputs on a CPU: products by the vendor library, and C++ passes over the logits.

    z    = weight hidden^T + bias                                    [V, N]
    loss = log(sum(exp(z - m))) + m - (1 - e) z[label] - e / V * sum(z)      [N],  m = max(z)
    dz   = (softmax(z) - (1 - e) onehot(label) - e / V) * dloss      [V, N]

    dhidden = dz^T weight   [N, C]      dweight = dz hidden   [V, C]      dbias = row sums of dz   [V]

The vocabulary is processed in chunks whose z and dz stay in the cache. A row of the stored z [V, N] is a word: so
weight, the larger factor, needs no transposition, and a SIMD lane sums over the words of one row of hidden. A small z
(without bias, in the working dtype) is saved for the backward pass, a large one is computed again. The backward pass
computes dz, so any upstream gradient works. A row's loss is summed in the same order with any number of threads.

m and the sum are saved as two numbers. One logsumexp would be rounded like a logit, which changes all probabilities of
a row by one factor: at logits of 1,000 by 3e-5, an error that grows with the mean of the weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .._library import by_torch, plain_gradients
from . import operators as cpp
from .library import LOSS_ROWS
from .pointers import address

CHUNK_BYTES = 4 << 20  # size of z in one chunk: 2,621 words with 800 rows in bfloat16
LEAST_WORDS = 512  # least words of a chunk, so that adding to dhidden takes little time beside the products
KEPT_BYTES = 128 << 20  # largest z that is saved: 2,200 rows of BERT's vocabulary in bfloat16


def takes_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> bool:
    """Whether `row_losses` supports these arguments, with or without gradients."""
    given = (hidden, weight) if bias is None else (hidden, weight, bias)
    return len(hidden) > 0 and labels.dtype == torch.int64 and cpp.knows(*given)


def row_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float) -> Tensor:
    """The losses [N] float32, N > 0, of arguments that `takes_loss` supports.

    Raises: IndexError for a label that is not in the vocabulary.
    """
    rows, words = len(hidden), len(weight)
    for label in (labels.min(), labels.max()):
        if not 0 <= label < words:
            raise IndexError(f"Target {int(label)} is out of bounds.")
    # Rows of zeros fill up the last block. Their losses are cut off, so their upstream gradients are zero.
    filler = -rows % LOSS_ROWS
    hidden, labels = F.pad(hidden, (0, 0, 0, filler)), F.pad(labels, (0, filler))
    return _Losses.apply(hidden, weight, bias, labels, smoothing, torch.is_grad_enabled())[:rows]


def _plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float) -> Tensor:
    """The same losses from torch's operators."""
    logits = F.linear(hidden, weight, bias).float()
    return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")


class _Losses(torch.autograd.Function):
    """The losses of a number of rows that is a multiple of LOSS_ROWS."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float,
        graph: bool,
    ) -> Tensor:  # fmt: skip
        rows, words = len(hidden), len(weight)
        narrow = labels.int()
        greatest = torch.full((rows,), torch.finfo(torch.float32).min, dtype=torch.float32, device="cpu")
        sums, totals, of_label = torch.zeros(3, rows, dtype=torch.float32, device="cpu")
        keep = graph and any(ctx.needs_input_grad) and rows * words * hidden.element_size() <= KEPT_BYTES
        chunk = _chunk_words(hidden)
        z = hidden.new_empty(words if keep else min(chunk, words), rows)

        for first in range(0, words, chunk):
            part = weight[first : first + chunk]
            of_part = z[first : first + chunk] if keep else z[: len(part)]
            torch.mm(part, hidden.t(), out=of_part)
            sum_logits(of_part, bias, narrow, greatest, sums, totals, of_label, first)

        ctx.save_for_backward(hidden, weight, bias, labels, greatest, sums.log2(), z if keep else None)
        ctx.smoothing = smoothing
        losses = sums.log() + (greatest - of_label)
        return losses + smoothing * (of_label - totals / words) if smoothing else losses

    @staticmethod
    def backward(ctx: FunctionCtx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, greatest, log2_sums, kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if by_torch(dloss):
            grads = plain_gradients(
                lambda *inputs: _plain(*inputs, labels, ctx.smoothing), (hidden, weight, bias), wanted, dloss
            )
            return *grads, None, None, None

        rows, words = len(hidden), len(weight)
        narrow, dloss = labels.int(), dloss.contiguous()
        chunk = _chunk_words(hidden)
        dhidden = torch.zeros(hidden.shape, dtype=torch.float32, device="cpu") if wanted[0] else None
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[1] else None
        dbias = torch.empty(words, dtype=torch.float32, device="cpu")
        buffer = hidden.new_empty(min(chunk, words), rows)

        for first in range(0, words, chunk):
            part, dz = weight[first : first + chunk], buffer[: words - first]
            z = torch.mm(part, hidden.t(), out=dz) if kept is None else kept[first : first + chunk]
            logit_gradients(z, bias, narrow, greatest, log2_sums, dloss, dz, dbias, first, ctx.smoothing, words)
            if wanted[1]:
                torch.mm(dz, hidden, out=dweight[first : first + chunk])
            if wanted[0]:
                dhidden += dz.t() @ part

        dhidden = dhidden.to(hidden.dtype) if wanted[0] else None
        return dhidden, dweight, dbias.to(bias.dtype) if wanted[2] else None, None, None, None


def _chunk_words(hidden: Tensor) -> int:
    return max(LEAST_WORDS, CHUNK_BYTES // (len(hidden) * hidden.element_size()))


# ---- the C++ passes over logits ---------------------------------------------------------------------------


def _logits(function: str, logits: Tensor, bias: Tensor | None, labels: Tensor, first: int) -> tuple[int | None, ...]:
    """The addresses of logits [words, N], bias [V] and labels [N] int32, the inputs of both passes over logits."""
    words, rows = logits.shape
    cpp.expect_multiple(function, "the number of rows", rows, LOSS_ROWS)
    if bias is not None and not 0 <= first <= first + words <= len(bias):
        raise ValueError(f"{function}: got words {first} to {first + words}, but a bias of {len(bias)}")
    return (
        address("logits", logits, logits.dtype, words * rows),
        None if bias is None else address("bias", bias, logits.dtype, bias.numel()),
        address("labels", labels, torch.int32, rows),
    )


def sum_logits(
    logits: Tensor, bias: Tensor | None, labels: Tensor, greatest: Tensor, sums: Tensor, totals: Tensor,
    of_label: Tensor, first: int,
) -> None:  # fmt: skip
    """Updates the statistics of z = logits + bias with logits [words, N], those of the words from `first` on.

    greatest: max z; sums: sum of exp(z - greatest); totals: sum of z; of_label: the label's z; all [N] float32.
    bias [V] or None, labels [N] int32.
    """
    words, rows = logits.shape
    summed = {"greatest": greatest, "sums": sums, "totals": totals, "of_label": of_label}
    cpp.call(
        "sum_logits", logits.dtype, *_logits("sum_logits", logits, bias, labels, first),
        *(address(name, t, torch.float32, rows) for name, t in summed.items()), first, words, rows,
    )  # fmt: skip


def logit_gradients(
    logits: Tensor, bias: Tensor | None, labels: Tensor, greatest: Tensor, log2_sums: Tensor, dloss: Tensor,
    dz: Tensor, dbias: Tensor, first: int, smoothing: float, vocabulary: int,
) -> None:  # fmt: skip
    """Fills dz [words, N], which may be the same tensor as logits, and the entries of these words in dbias [V] float32.

    greatest, log2_sums (log2 of the `sums` of `sum_logits`) and dloss: [N] float32.
    """
    words, rows = logits.shape
    of_rows = {"greatest": greatest, "log2_sums": log2_sums, "dloss": dloss}
    if not 0 <= first <= first + words <= vocabulary:
        raise ValueError(f"logit_gradients: got words {first} to {first + words}, but a vocabulary of {vocabulary}")
    cpp.call(
        "logit_gradients", logits.dtype, *_logits("logit_gradients", logits, bias, labels, first),
        *(address(name, t, torch.float32, rows) for name, t in of_rows.items()),
        address("dz", dz, logits.dtype, words * rows), address("dbias", dbias, torch.float32, vocabulary),
        first, words, rows, smoothing, smoothing / vocabulary,
    )  # fmt: skip
