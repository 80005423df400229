"""Calls of the Triton attention in every variant, compared with float64."""

import pytest
import torch

pytest.importorskip("triton", reason="tests the Triton kernels")

from fastbert import functional
from fastbert.kernels import attention as kernels
from fastbert.kernels import reference
from fastbert.testing import allowed_factor, assert_within_budget, cu_seqlens_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if functional.why_not_triton(DEVICE):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

torch.set_num_threads(1)


def random_qkv(lengths_q, lengths_k=None, heads=2, kv_heads=None, head_dim=32):
    """q, k, v of packed sequences in float64, before they are rounded to a dtype."""
    rows_q, rows_k = sum(lengths_q), sum(lengths_q if lengths_k is None else lengths_k)
    kv_heads = heads if kv_heads is None else kv_heads
    shapes = ((rows_q, heads, head_dim), (rows_k, kv_heads, head_dim), (rows_k, kv_heads, head_dim))
    return [torch.randn(shape, dtype=torch.float64, device=DEVICE) for shape in shapes]


def padded_of(packed, lengths, width, fill=float("nan")):
    """Packed [T, ...] as padded [B, width, ...], whose padding is NaN."""
    out = packed.new_full((len(lengths), width, *packed.shape[1:]), fill)
    for row, sequence in zip(out, packed.split(lengths), strict=True):
        row[: len(sequence)] = sequence
    return out


def lengths_tensor(lengths):
    return torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def options_of(name, lengths_q, lengths_k=None, heads=2, head_dim=32):
    """The keyword arguments of one variant; floating-point tensors are float64."""
    batch, width_q = len(lengths_q), max(lengths_q)
    width_k = max(lengths_q if lengths_k is None else lengths_k)
    double = {"dtype": torch.float64, "device": DEVICE}
    angles = torch.randn(max(width_q, width_k), head_dim // 2, **double)
    dropout = {"dropout_p": 0.3, "seed": torch.tensor([7], device=DEVICE), "stream": 3}
    every = {
        "plain": {},
        "scale": {"scale": 0.7},
        "bias_of_all": {"bias": torch.randn(batch, heads, width_q, width_k, **double)},
        "bias_of_heads": {"bias": torch.randn(1, heads, width_q, width_k, **double)},
        "bias_of_batch": {"bias": torch.randn(batch, 1, width_q + 3, width_k + 5, **double)},
        "bias_of_none": {"bias": torch.randn(1, 1, width_q, width_k, **double)},
        "mask": {"mask": torch.rand(batch, 1, width_q, width_k, device=DEVICE) > 0.4},
        "alibi": {"alibi_slopes": torch.rand(heads, **double)},
        "window": {"window": (9, 4)},
        "rotary": {"rotary": (angles.cos(), angles.sin())},
        "dropout": dropout,
        "ids": dropout | {"sequence_ids": torch.arange(batch, device=DEVICE) * 3 + 2**30},
    }
    every["together"] = {k: v for n in ("bias_of_heads", "mask", "alibi", "window", "rotary", "ids") for k, v in
                         every[n].items()}  # fmt: skip
    return every[name]


def cast(value, dtype):
    """The value with its floating-point tensors in dtype, those inside tuples too."""
    if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
        return tuple(cast(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def run(op, qkv, args, options, upstream, dtype):
    """o, lse and the gradients of q, k, v (and bias) for upstream gradients (do, dlse), all by name."""
    # detached, because `.to` of the same dtype returns the same tensor, and two runs would add up in its .grad
    leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in zip("qkv", qkv, strict=True)}
    options = {n: cast(v, dtype) for n, v in options.items()}
    if options.get("bias") is not None:
        leaves["bias"] = options["bias"] = options["bias"].detach().requires_grad_()
    o, lse = op(*(leaves[n] for n in "qkv"), *args, return_lse=True, **options)
    do, dlse = upstream(o, lse)
    torch.autograd.backward((o, lse), (do.to(o.dtype), dlse.to(lse.dtype)))
    return {"o": o, "lse": lse} | {f"d{n}": t.grad for n, t in leaves.items()}


def random_upstream():
    """Random do and dlse, the same for every dtype."""
    made = {}

    def upstream(o, lse):
        if not made:
            made["do"], made["dlse"] = (torch.randn(t.shape, dtype=torch.float64, device=DEVICE) for t in (o, lse))
        return made["do"], made["dlse"]

    return upstream


def check(qkv, args, options, dtype, padded=False):
    """Compares ours with float64; the error of plain torch in the same dtype sets the budget."""
    ours_op = kernels.attention_padded if padded else kernels.attention
    reference_op = reference.attention_padded if padded else reference.attention
    upstream = random_upstream()
    # round the inputs first, so that all three see the same numbers
    qkv, options = [t.to(dtype) for t in qkv], {n: cast(v, dtype) for n, v in options.items()}
    truth = run(reference_op, qkv, args, options, upstream, torch.float64)
    plain = run(reference_op, qkv, args, options, upstream, dtype)
    ours = run(ours_op, qkv, args, options, upstream, dtype)
    for name, value in ours.items():
        assert value.dtype == (torch.float32 if name == "lse" else dtype), name
        assert_within_budget(value, plain[name], truth[name], name, allowed_factor(dtype, interpreted_bf16=6.0))
    return ours


def check_packed(lengths_q, lengths_k=None, variant="plain", dtype=torch.float16, heads=2, kv_heads=None, head_dim=32):
    args = [cu_seqlens_of(lengths_q, DEVICE), max(lengths_q, default=0)]
    options = options_of(variant, lengths_q, lengths_k, heads, head_dim) if variant != "plain" else {}
    if lengths_k is not None:
        options = options | {"cu_seqlens_k": cu_seqlens_of(lengths_k, DEVICE), "max_seqlen_k": max(lengths_k)}
    return check(random_qkv(lengths_q, lengths_k, heads, kv_heads, head_dim), args, options, dtype)
