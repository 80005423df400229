"""Single operators of fastbert and other libraries: forward, and forward and backward with a random upstream gradient.

FLOPs and bytes are those of `costs.py`. The true values are the reference's in float64; plain torch in the same dtype
sets the budget.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert import functional as F
from fastbert.testing import INPUTS, Workload

from .. import peers
from ..harness import costs, workloads
from ..harness.case import Case, Row
from ..harness.costs import BOTH, FORWARD
from ..harness.peer import AttentionPeer, OperatorPeer

# operator, direction, workload, priority (smaller first), in --quick, options. The order on a GPU: attention at BERT's
# sizes, then the other operators of a layer, then long and unusual shapes.
CASES: tuple[tuple[str, str, str, int, bool, dict[str, Any]], ...] = (
    ("attention", FORWARD, "base_512", 10, False, {}),
    ("attention", FORWARD, "base_natural", 11, True, {}),
    ("attention", BOTH, "base_512", 12, False, {}),
    ("attention", BOTH, "base_natural", 13, True, {}),
    ("attention", BOTH, "base_512", 14, False, {"dropout_p": 0.1}),
    ("attention", BOTH, "base_natural", 15, False, {"dropout_p": 0.1}),
    ("add_layer_norm", FORWARD, "base_natural", 20, True, {}),
    ("add_layer_norm", BOTH, "base_natural", 21, True, {}),
    ("add_layer_norm", FORWARD, "large_512", 22, False, {}),
    ("add_layer_norm", BOTH, "large_512", 22, False, {}),
    ("add_layer_norm", BOTH, "base_natural", 23, False, {"dropout_p": 0.1}),
    ("feed_forward", FORWARD, "base_natural", 24, True, {}),
    ("feed_forward", BOTH, "base_natural", 25, True, {}),
    ("feed_forward", FORWARD, "large_512", 26, False, {}),
    ("feed_forward", BOTH, "large_512", 27, False, {}),
    ("linear_cross_entropy", BOTH, "base_natural", 28, True, {}),
    ("linear_cross_entropy", FORWARD, "base_natural", 29, False, {}),
    ("attention", FORWARD, "base_256x128", 30, False, {}),
    ("attention", BOTH, "base_256x128", 30, False, {}),
    ("attention", FORWARD, "large_512", 31, False, {}),
    ("attention", BOTH, "large_512", 31, False, {}),
    ("attention", FORWARD, "base_8x2048", 32, False, {}),
    ("attention", BOTH, "base_8x2048", 32, False, {}),
    ("attention", FORWARD, "base_4x4096", 33, False, {}),
    ("attention", BOTH, "base_4x4096", 33, False, {}),
    ("attention", FORWARD, "base_16x1024", 33, False, {}),
    ("attention", BOTH, "base_16x1024", 33, False, {}),
    ("attention", FORWARD, "base_queries", 34, False, {}),
    ("attention", FORWARD, "base_paragraphs", 34, False, {}),
    ("attention", FORWARD, "base_one_long", 35, False, {}),
    ("embedding_layer_norm", FORWARD, "base_natural", 36, True, {}),
    ("embedding_layer_norm", BOTH, "base_natural", 37, False, {}),
    ("pool", FORWARD, "base_natural", 38, True, {}),
)
# Cases on GPUs only: every length with 12 and with 16 heads, and few and many rows.
ON_GPUS: tuple[tuple[str, str, str, int, bool, dict[str, Any]], ...] = (
    *(("attention", direction, f"large_{size}", 34, False, {})
      for size in ("256x128", "64x256", "16x1024", "8x2048", "4x4096") for direction in (FORWARD, BOTH)),
    *(("attention", direction, name, 34, False, {})
      for name in ("base_64x256", "large_natural", "base_sentences") for direction in (FORWARD, BOTH)),
    ("attention", BOTH, "base_16x1024", 35, False, {"dropout_p": 0.1}),
    *(("add_layer_norm", direction, name, 35, False, {})
      for name in ("base_64x128", "base_512x128", "large_64x128", "large_512x128") for direction in (FORWARD, BOTH)),
    *(("feed_forward", direction, name, 35, False, {})
      for name in ("base_64x128", "base_512x128", "large_64x128") for direction in (FORWARD, BOTH)),
    *(("linear_cross_entropy", BOTH, name, 35, False, {}) for name in ("base_16x128", "base_64x128")),
)  # fmt: skip


def work(
    op: str, direction: str, w: Workload, dtype: torch.dtype, dropout: bool = False
) -> tuple[float | None, float | None]:
    """(FLOPs or None where there is no product, bytes) of a case."""
    forward, backward = costs.of_operator(op, w, dtype.itemsize, direction == BOTH, dropout)
    total = forward + backward if direction == BOTH else forward
    return total.flops or None, total.bytes


def _leaves(inputs: dict[str, Any], backward: bool) -> dict[str, Tensor]:
    return {
        name: value.detach().clone().requires_grad_(backward)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def _bound(function: Callable[..., Tensor], inputs: dict[str, Any]) -> Callable[..., Tensor]:
    """A function of the tensors with gradients only, with all other `inputs` bound to `function`."""
    return lambda **leaves: function(**{**inputs, **leaves})


def _runner(call: Callable[..., Tensor], leaves: dict[str, Tensor], upstream: Tensor, direction: str):
    """The function to time: it computes the output, or the output and every leaf's gradient."""
    values = list(leaves.values())

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [call(**leaves)]

    def both() -> list[Tensor]:
        out = call(**leaves)
        return [out, *torch.autograd.grad(out, values, upstream)]

    return forward if direction == FORWARD else both


def build(
    op: str, direction: str, name: str, priority: int, quick: bool, options: dict[str, Any], *,
    device: torch.device, dtype: torch.dtype, small: bool = False, workload: Workload | None = None,
    extra: tuple[OperatorPeer, ...] = (),
) -> Case:  # fmt: skip
    """One case. Inputs are made with its first row and shared by all rows; `extra` rows are for tests."""
    # the loss takes about 30 times as long for a token as another operator
    w = workload or workloads.fit(name, device, "loss" if op == "linear_cross_entropy" else "kernels", small)

    @functools.lru_cache(maxsize=1)
    def inputs() -> dict[str, Any]:
        made = INPUTS[op](w.model, w.lengths, **options)
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in made.items()}
        return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in moved.items()}

    @functools.lru_cache(maxsize=1)
    def upstream() -> Tensor:
        """A random gradient in the layout and dtype of the operator's output."""
        with torch.no_grad():
            out = getattr(F, op)(**inputs())
        generator = torch.Generator().manual_seed(1)
        return torch.randn(out.shape, generator=generator).to(out)

    def reference(working: torch.dtype) -> list[Tensor]:
        leaves = {
            k: v.detach().to(working).requires_grad_(direction != FORWARD) for k, v in _leaves(inputs(), False).items()
        }
        call = _bound(functools.partial(getattr(F, op), impl="reference"), inputs())
        return _runner(
            call, leaves, upstream().to(torch.float64 if working == torch.float64 else upstream().dtype), direction
        )()

    def made_by(function: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        backward = direction != FORWARD
        return _runner(_bound(function, inputs()), _leaves(inputs(), backward), upstream(), direction)

    rows = _attention_rows(inputs, upstream, direction, device) if op == "attention" else [
        _op_row(peer, made_by, device) for peer in peers.operators(op) if device.type in peer.devices
    ]  # fmt: skip
    rows += [_op_row(peer, made_by, device) for peer in extra]
    flops, moved = work(op, direction, w, dtype, bool(options.get("dropout_p")))
    model = workloads.model_name(name)
    shape = workloads.shape_of(w) | {k: v for k, v in options.items() if isinstance(v, (int, float))}
    return Case(
        "kernels", name, rows, functools.partial(reference, torch.float64), functools.partial(reference, dtype),
        model, op, direction, dtype, shape, w.tokens, flops, moved, priority, quick,
        random=bool(options.get("dropout_p")),
    )  # fmt: skip


def _op_row(peer: OperatorPeer, made_by, device: torch.device) -> Row:
    return Row(peer.row, peer.peer, lambda: made_by(peer.make(device)), package=peer.package, slow=peer.slow)


def _attention_rows(inputs, upstream, direction: str, device: torch.device) -> list[Row]:
    def make(peer: AttentionPeer, kept: dict):
        def made():
            given = inputs()
            prepared = kept["prepared"] = peer.prepare(given)
            leaves = {
                name: prepared.there(given[name]).detach().requires_grad_(direction != FORWARD)
                for name in ("q", "k", "v")
            }
            return _runner(prepared.call, leaves, prepared.there(upstream()), direction)

        return made

    rows = []
    for peer in peers.rows("ATTENTION"):
        if device.type in peer.devices:
            kept: dict[str, Any] = {}
            rows.append(
                Row(
                    peer.row,
                    peer.peer,
                    make(peer, kept),
                    package=peer.package,
                    slow=peer.slow,
                    outputs=lambda made, kept=kept: [kept["prepared"].back(t) for t in made],
                )
            )
    return rows


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for op, direction, name, priority, in_quick, options in (*CASES, *(ON_GPUS if device.type == "cuda" else ())):
        if in_quick or not quick:
            yield build(op, direction, name, priority, in_quick, options, device=device, dtype=dtype, small=quick)
