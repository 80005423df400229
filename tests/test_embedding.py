"""embedding_layer_norm in Triton: outputs and gradients against float64, the deterministic scatter, and properties."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

pytest.importorskip("triton", reason="tests the Triton kernels")

from fastbert import functional
from fastbert.kernels import _scatter, embedding, reference
from fastbert.kernels._random import keep_mask, row_keys
from fastbert.testing import ModelShape, allowed_factor, assert_op, embedding_inputs

if functional.why_not_triton(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

torch.set_num_threads(1)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CHUNK = _scatter.scatter_config(64).chunk


def inputs_of(width, lengths, vocab=48, **options):
    return embedding_inputs(ModelShape(width, 1, width, 1, vocab=vocab), lengths, **options)


# ---- against the reference -------------------------------------------------------------------------------

WIDTHS = {
    "one_column": 1,
    "under_a_block": 7,
    "several_rows_a_warp": 64,
    "base": 768,
    "two_column_blocks": 1536,  # a program of the scatter takes 1,024 columns
    "token_types_apart": 5000,  # too wide to sum the token types inside LayerNorm's backward pass
}


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_widths(width, device):
    eps = {"eps": 0.1} if width == 1 else {}
    assert_op("embedding_layer_norm", inputs_of(width, [3, 2], dropout_p=0.1, **eps), torch.float32, device)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, dropout_p, device):
    inputs = inputs_of(40, [5, 66, 1, 9], dropout_p=dropout_p, padding_idx=0)
    assert_op("embedding_layer_norm", inputs, dtype, device, factor=allowed_factor(dtype))


@pytest.mark.parametrize("types", [None, 1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_token_types(bias, types, device):
    """No token types, few (summed inside LayerNorm's backward pass), and so many that they are sorted."""
    inputs = inputs_of(24, [30])
    if types is None:
        inputs |= {"token_type_ids": None, "token_type": None}
    else:
        inputs |= {"token_type_ids": torch.arange(30) % types, "token_type": torch.randn(types, 24)}
    if not bias:
        inputs["bias"] = None
    assert_op("embedding_layer_norm", inputs, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_id_dtypes(dtype, device):
    inputs = inputs_of(24, [30, 9])
    inputs |= {name: inputs[name].to(dtype) for name in ("input_ids", "token_type_ids", "positions")}
    assert_op("embedding_layer_norm", inputs, torch.float32, device)


@pytest.mark.parametrize("lengths", [[0], []], ids=["no_tokens", "no_sequences"])
def test_no_tokens(lengths, device):
    assert_op("embedding_layer_norm", inputs_of(24, lengths, dropout_p=0.1), torch.float32, device)


# ---- the scatter -----------------------------------------------------------------------------------------

# how often ids 0, 1, 2, ... occur: runs of the sorted ids, for chunks of 64
RUNS = {
    "one_token": [1],
    "all_alike": [CHUNK * 3 + 5],  # whole chunks from the start
    "exactly_one_chunk": [CHUNK],
    "ends_on_a_chunk": [5, CHUNK - 5, 2 * CHUNK, 7],
    "starts_in_a_chunk": [10, 2 * CHUNK],  # a beginning, one whole chunk, an end
    "two_ragged_ends_only": [40, CHUNK + 20, 30],  # longer than a chunk, without covering one
    "rows_without_tokens": [0, 3, 0, 0, 70, 0],
    "many_whole_chunks": [1, CHUNK * 6 + 1, 1],  # more sums of chunks than are loaded at once
}


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS.keys())
def test_scatter_of_runs(runs, device):
    """Sums over tokens for any order of ids, exact here because they are small integers in float32."""
    ids = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(runs)).to(device)
    ids = ids[torch.randperm(len(ids), device=device)]
    dz = torch.randint(-50, 50, (len(ids), 40), device=device).float()
    dtable = torch.empty(len(runs) + 1, 40, device=device)
    _scatter.scatter(dz, ids, dtable, skip_row=-1)
    assert torch.equal(dtable, torch.zeros_like(dtable).index_add_(0, ids, dz))


def test_scatter_keeps_poison_in_its_row(device):
    ids = torch.tensor([0, 1, 2] * 60, device=device)
    dz = torch.ones(180, 8, device=device)
    dz[ids == 1] = torch.nan
    dtable = torch.empty(3, 8, device=device)
    _scatter.scatter(dz, ids, dtable, skip_row=-1)
    assert torch.equal(dtable[::2], torch.full((2, 8), 60.0, device=device))
    assert dtable[1].isnan().all()


def gradients_of(inputs, device, seed=0):
    """dword, dposition, dtoken_type, dweight, dbias under a random upstream gradient."""
    names = ("word", "position", "token_type", "weight", "bias")
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    leaves = [inputs[name].clone().requires_grad_() for name in names]
    y = embedding.embedding_layer_norm(**inputs | dict(zip(names, leaves, strict=True)))
    generator = torch.Generator().manual_seed(seed)
    return torch.autograd.grad(y, leaves, torch.randn(y.shape, generator=generator).to(device))


def test_twice_the_same_bits(device):
    inputs = inputs_of(40, [90], vocab=2, dropout_p=0.1)
    assert all(map(torch.equal, gradients_of(inputs, device), gradients_of(inputs, device)))


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_padding_row_gets_no_gradient(padding_idx, device):
    inputs = inputs_of(24, [130], vocab=8, padding_idx=padding_idx) | {"input_ids": torch.arange(130) % 8}
    dword = gradients_of(inputs, device)[0]
    assert torch.equal(dword[padding_idx], torch.zeros(24, device=device))
    assert dword.abs().sum(1).count_nonzero() == 7


def test_ids_out_of_range_touch_no_memory_outside(device):
    """Such an id reads a row of zeros and gets no gradient. (The caller checks ids; this only limits the damage.)"""
    inputs = inputs_of(24, [12], vocab=8)
    bad = {
        "input_ids": torch.tensor([8, -1, 2**40, -(2**40), 7, 0] * 2),
        "positions": torch.tensor([12, -1] * 6),
        "token_type_ids": torch.tensor([2, -1, 0, 1] * 3),
    }
    padded = inputs | {
        name: torch.cat((inputs[name], torch.zeros(1, 24))) for name in ("word", "position", "token_type")
    }
    right = padded | {
        name: torch.where((ids >= 0) & (ids < len(inputs[table])), ids, len(inputs[table]))
        for (name, ids), table in zip(bad.items(), ("word", "position", "token_type"), strict=True)
    }
    for ours, expected in zip(gradients_of(inputs | bad, device), gradients_of(right, device), strict=True):
        torch.testing.assert_close(ours, expected[: len(ours)])


@pytest.mark.parametrize("wanted", range(5), ids=["word", "position", "token_type", "weight", "bias"])
def test_a_gradient_alone_has_the_same_bits(wanted, device):
    inputs = inputs_of(40, [70, 3], vocab=16)
    expected = gradients_of(inputs, device)[wanted]
    tensors = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    leaf = ["word", "position", "token_type", "weight", "bias"][wanted]
    tensors[leaf] = tensors[leaf].clone().requires_grad_()
    y = embedding.embedding_layer_norm(**tensors)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(torch.autograd.grad(y, tensors[leaf], upstream)[0], expected)


TABLES = ["word", "position", "token_type", "weight", "bias"]


@pytest.mark.parametrize("wanted", TABLES)
@pytest.mark.parametrize("types", [1, 2, 3])
def test_one_kernel_computes_any_set_of_gradients(types, wanted, device, kernels_of):
    """Two kernels could add in different orders, since the compiler chooses layouts by loads and stores."""
    inputs = inputs_of(7, [30]) | {"token_type_ids": torch.arange(30) % types, "token_type": torch.randn(types, 7)}
    inputs = {name: t.to(device) for name, t in inputs.items()}

    def gradients(names):
        leaves = {name: inputs[name].clone().requires_grad_(name in names) for name in TABLES}
        y = embedding.embedding_layer_norm(**inputs | leaves)
        return torch.autograd.grad(y, [leaves[name] for name in names], torch.ones_like(y))

    assert kernels_of(lambda: gradients([wanted])) <= kernels_of(lambda: gradients(TABLES))


def test_forward_is_one_kernel_with_and_without_gradients(device, kernels_of):
    inputs = {name: t.to(device) for name, t in inputs_of(40, [9]).items()}
    forward = lambda: embedding.embedding_layer_norm(**inputs)  # noqa: E731
    alone, kernel = forward(), kernels_of(forward)
    inputs["word"].requires_grad_()
    assert kernels_of(forward) == kernel
    assert torch.equal(forward(), alone)


# ---- layouts, dropout, properties ------------------------------------------------------------------------


def test_strided_inputs(device):
    """Ids of stride 2, tables cut from wider ones and an expanded upstream gradient give the same bits."""
    inputs = inputs_of(20, [9])
    strided = dict(inputs)
    for name in ("input_ids", "token_type_ids", "positions"):
        strided[name] = torch.stack((inputs[name], torch.full_like(inputs[name], 10**6)), dim=1)[:, 0]
    for name in ("word", "position", "token_type"):
        strided[name] = torch.cat((inputs[name], torch.full_like(inputs[name], torch.nan)), dim=1)[:, :20]

    def run(inputs):
        inputs = {name: t.to(device).detach().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
        y = embedding.embedding_layer_norm(**inputs)
        return y, *torch.autograd.grad(y, (inputs["word"], inputs["weight"]), torch.linspace(0, 1, 20).expand(9, 20))

    for ours, expected in zip(run(strided), run(inputs), strict=True):
        assert torch.equal(ours, expected)


def test_dropout_mask_is_the_specification_s(device):
    """Exactly the same mask in the forward pass, and in the backward pass, where dbias counts the kept tokens."""
    inputs = inputs_of(40, [37])
    inputs = {name: t.to(device) for name, t in inputs.items()}
    inputs["weight"] = torch.zeros(40, device=device)
    inputs["bias"] = torch.ones(40, device=device, requires_grad=True)
    seed, names = torch.tensor([2**40 + 9], device=device), torch.randint(-(2**62), 2**62, (37,), device=device)
    y = embedding.embedding_layer_norm(**inputs, dropout_p=0.25, seed=seed, stream=5, row_ids=names)
    keep = keep_mask(row_keys(seed, 5, names), 40, 0.25)
    assert torch.equal(y != 0.0, keep)
    (dbias,) = torch.autograd.grad(y, inputs["bias"], torch.ones_like(y))
    torch.testing.assert_close(dbias, keep.sum(0) / 0.75)


def test_a_token_alone_has_the_same_bits(device):
    inputs = inputs_of(384, [11])
    seed = torch.tensor([3], device=device)

    def run(tokens):
        chosen = {name: t[tokens] if t.dim() == 1 and len(t) == 11 else t for name, t in inputs.items()}
        chosen = {name: t.to(device) for name, t in chosen.items()}
        return embedding.embedding_layer_norm(**chosen, dropout_p=0.1, seed=seed, row_ids=tokens.to(device))

    together = run(torch.arange(11))
    for tokens in (torch.tensor([7]), torch.tensor([10, 2, 5])):
        assert torch.equal(run(tokens), together[tokens.to(device)])


def test_tables_too_wide(device):
    inputs = {name: t.to(device) for name, t in inputs_of(8193, [1], vocab=2).items()}
    with pytest.raises(ValueError, match="1 to 8192 columns, got 8193"):
        embedding.embedding_layer_norm(**inputs)


# ---- torch.library, compile, export ----------------------------------------------------------------------


def test_opcheck(device):
    inputs = {name: t.to(device) for name, t in inputs_of(24, [9]).items()}
    ids = inputs["input_ids"], inputs["token_type_ids"], inputs["positions"]
    tables = [inputs[name] for name in ("word", "position", "token_type", "weight", "bias")]
    dropout = torch.tensor([1], device=device), torch.arange(9, device=device), 0.1, 2
    for want_stats in (False, True):
        torch.library.opcheck(
            torch.ops.fastbert.embedding_layer_norm_fwd.default, (*ids, *tables, 1e-12, *dropout, want_stats)
        )
    dy, mean, rstd = torch.randn(9, 24, device=device), torch.randn(9, 2, device=device), torch.rand(9, device=device)
    for wanted in ([True] * 5, [False, True, False, True, False]):
        torch.library.opcheck(
            torch.ops.fastbert.embedding_layer_norm_bwd.default, (dy, *ids, *tables, mean, rstd, *dropout, 0, wanted)
        )


def test_compiles_once_for_all_lengths(device):
    inputs = {name: t.to(device) for name, t in inputs_of(24, [40]).items()}
    tables = {name: inputs[name].requires_grad_() for name in ("word", "position", "token_type", "weight", "bias")}
    seed = torch.tensor([1], device=device)

    def f(input_ids, token_type_ids, positions):
        return embedding.embedding_layer_norm(
            input_ids, token_type_ids, positions, **tables, padding_idx=0, dropout_p=0.2, seed=seed
        )

    counter = CompileCounter()
    for backend in (counter, "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
        for n in (7, 12, 33):
            ids = [inputs[name][:n] for name in ("input_ids", "token_type_ids", "positions")]
            dy = torch.randn(n, 24, device=device)
            grads = [torch.autograd.grad(g(*ids), list(tables.values()), dy) for g in (compiled, f)]
            for ours, expected in zip(*grads, strict=True):
                assert torch.equal(ours, expected)
    assert counter.frame_count == 1


def test_exports(device):
    inputs = {name: t.to(device) for name, t in inputs_of(24, [40]).items()}
    names = ("input_ids", "token_type_ids", "positions")
    tables = {name: t for name, t in inputs.items() if name not in names}

    class Embed(torch.nn.Module):
        def forward(self, input_ids, token_type_ids, positions):
            return embedding.embedding_layer_norm(input_ids, token_type_ids, positions, **tables)

    tokens = torch.export.Dim("tokens", min=2, max=1000)
    exported = torch.export.export(
        Embed(), tuple(inputs[name][:9] for name in names), dynamic_shapes=({0: tokens},) * 3
    )
    assert any("embedding_layer_norm_fwd" in str(node.target) for node in exported.graph.nodes)
    ids = [inputs[name] for name in names]
    assert torch.equal(exported.module()(*ids), Embed()(*ids))
    torch.testing.assert_close(Embed()(*ids), reference.embedding_layer_norm(*ids, **tables))
