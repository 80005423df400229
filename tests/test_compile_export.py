"""torch.compile and torch.export of BertModel and accelerated models, in one graph for changing lengths."""

import io

import pytest
import torch
from torch.export import Dim

import fastbert
import fastbert.functional as F
from fastbert import BertConfig, BertModel, PackedBatch
from fastbert.testing import assert_within_budget

transformers = pytest.importorskip("transformers", reason="compared with transformers")

pytestmark = pytest.mark.native

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 40,
}  # fmt: skip
# lengths in batches of different shapes; one batch has an empty sequence, one only single tokens
BATCHES = ([9, 4, 2], [12, 1, 7, 3], [5, 0], [1, 1, 1])


def batch_of(lengths: list[int], masked: bool = True) -> dict[str, torch.Tensor]:
    width = max(lengths)
    batch = {"input_ids": torch.randint(1, 60, (len(lengths), width))}
    if masked:
        batch["attention_mask"] = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return batch


def model_of(**more) -> BertModel:
    model = BertModel(BertConfig(**SIZES, **more), impl="native").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model


def theirs_of(model: BertModel) -> torch.nn.Module:
    config = transformers.BertConfig(**SIZES, attn_implementation="eager")
    theirs = transformers.BertModel(config).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")


def assert_right(got, model: BertModel, batch: dict[str, torch.Tensor]) -> None:
    """Within the budget set by transformers' model, at the real tokens of non-empty sequences."""
    theirs = theirs_of(model)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    with torch.no_grad():
        plain, truth = theirs(**batch), theirs.double()(**batch)
    assert_within_budget(*(o.last_hidden_state[real] for o in (got, plain, truth)))
    assert_within_budget(*(o.pooler_output[real[:, 0]] for o in (got, plain, truth)))
    assert not got.last_hidden_state[~real].any()


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no_mask"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_bert_model_compiles_for_changing_lengths(grad, masked):
    """With a mask, the number of tokens depends on data. The pooler branched on whether there are any, and attention,
    where no text has more than one token, on whether there are as many as texts; so no graph could be made."""
    model = model_of()
    graph = compiled(model)
    for lengths in BATCHES:
        batch = batch_of(lengths, masked)
        with torch.set_grad_enabled(grad):
            assert_right(graph(**batch), model, batch)


def test_a_compiled_batch_without_a_token_gives_zeros():
    model = model_of()
    batch = batch_of([4, 3])
    nothing = batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])}
    graph = compiled(model)
    graph(**batch)
    got, eager = graph(**nothing), model(**nothing)
    assert not got.last_hidden_state.any()
    torch.testing.assert_close(got.pooler_output, eager.pooler_output)


def test_bert_model_compiles_in_training():
    """The dropout of probabilities is inside the opaque operator too. Its loop over lengths used to break the trace."""
    model = model_of(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.3).train()
    graph = compiled(model)
    for lengths in BATCHES[:2]:
        batch, grads = batch_of(lengths), []
        for of in (graph, model):
            model.zero_grad()
            torch.manual_seed(5)
            output = of(**batch)
            ((output.last_hidden_state**2).sum() + (output.pooler_output**2).sum()).backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        torch.testing.assert_close(*grads, atol=4e-5, rtol=1e-4)
    torch.manual_seed(6)
    other = graph(**batch).last_hidden_state
    assert not torch.allclose(other, output.last_hidden_state)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["heads", "grouped"])
def test_attention_compiles_with_its_gradients_where_no_cpp_takes_it(kv_heads, dropout):
    """Autograd cannot see inside an opaque operator: for a float64 model, and without the C++ operators, the backward
    pass of a compiled model raised."""
    torch._dynamo.reset()
    lengths = [5, 5, 1, 8]
    spans = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    leaves = [
        torch.randn(sum(lengths), heads, 8, dtype=torch.float64, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    ]
    options = {"dropout_p": dropout, "seed": torch.tensor([3])} if dropout else {}

    def attend(q, k, v):
        return F.attention(q, k, v, spans, 8, impl="native", **options)

    upstream = torch.randn(sum(lengths), 4, 8, dtype=torch.float64)
    graph = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected, got = (torch.autograd.grad(of(*leaves), leaves, upstream) for of in (attend, graph))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "options",
    [{"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": False}],
    ids=["states", "attentions", "tuple"],
)
def test_other_outputs_compile(options):
    model = model_of()
    graph = compiled(model)
    for lengths in BATCHES[:2]:
        batch = batch_of(lengths)
        leaves = [torch.utils._pytree.tree_leaves(of(**batch, **options)) for of in (graph, model)]
        assert len(leaves[0]) >= 2
        torch.testing.assert_close(*leaves)


def test_inductor_compiles_a_masked_batch():
    model = model_of()
    torch._dynamo.reset()
    graph = torch.compile(model, fullgraph=True)
    for lengths in BATCHES[:2]:
        batch = batch_of(lengths)
        with torch.no_grad():
            assert_right(graph(**batch), model, batch)


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_pooling_compiles_where_the_number_of_tokens_is_data(mode):
    def pooled(ids, mask):
        batch = PackedBatch.from_padded(ids, mask)
        x = torch.nn.functional.one_hot(batch.input_ids, 60).float()
        return F.pool(x, batch.cu_seqlens, mode, impl="native")

    torch._dynamo.reset()
    graph = torch.compile(pooled, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in BATCHES:
        batch = tuple(batch_of(lengths).values())
        torch.testing.assert_close(graph(*batch), pooled(*batch))


# ---- export -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not_strict"])
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no_mask"])
def test_bert_model_exports_for_changing_lengths(masked, strict):
    """torch.export refused every mask, and BertModel's output, which was not a pytree."""
    model = model_of()
    first = batch_of(BATCHES[0], masked)
    shapes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in first}
    with torch.no_grad():
        program = torch.export.export(model, (), first, dynamic_shapes=shapes, strict=strict)
        for lengths in BATCHES:
            batch = batch_of(lengths, masked)
            got = program.module()(**batch)
            assert isinstance(got, fastbert.models.bert.BertOutput)
            assert_right(got, model, batch)


def test_an_exported_program_is_saved_and_loaded():
    model, first, file = model_of(), batch_of(BATCHES[0]), io.BytesIO()
    shapes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in first}
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (), first, dynamic_shapes=shapes), file)
        file.seek(0)
        program = torch.export.load(file).module()
        batch = batch_of(BATCHES[1])
        assert_right(program(**batch), model, batch)


def test_a_packed_batch_is_an_input_of_an_exported_program():
    model = model_of()
    batch, other = (PackedBatch.from_lists([[1, 2, last], [4, 5]]) for last in (3, 9))
    with torch.no_grad():
        program = torch.export.export(model, (batch,)).module()
        torch.testing.assert_close(program(other).last_hidden_state, model(other).last_hidden_state)


@pytest.mark.parametrize(
    ("prefix", "strict"),
    [(prefix, False) for prefix in ("Bert", "Roberta", "DistilBert", "Electra", "MPNet", "ModernBert")]
    + [("Bert", True), ("ModernBert", True)],
)
@pytest.mark.filterwarnings("ignore")
def test_accelerated_models_export_for_changing_lengths(prefix, strict):
    """The program keeps padding, so it also holds for other masks. It gives the results of the accelerated model."""
    sizes = SIZES | ({"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64} if prefix == "DistilBert" else {})
    sizes |= {"embedding_size": 16} if prefix == "Electra" else {}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    plain = getattr(transformers, prefix + "Model")(getattr(transformers, prefix + "Config")(**sizes)).eval()
    truth = getattr(transformers, prefix + "Model")(plain.config).eval().double()
    truth.load_state_dict(plain.state_dict())
    ours = getattr(transformers, prefix + "Model")(plain.config).eval()
    ours.load_state_dict(plain.state_dict())
    ours = fastbert.accelerate(ours, impl="native")
    first = batch_of([9, 4, 2])
    shapes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in first}
    with torch.no_grad():
        program = torch.export.export(ours, (), first, dynamic_shapes=shapes, strict=strict).module()
        for lengths in BATCHES[:2]:
            batch = batch_of(lengths)
            real = batch["attention_mask"].bool()
            states = [of(**batch).last_hidden_state[real] for of in (program, plain, truth)]
            assert_within_budget(*states)
