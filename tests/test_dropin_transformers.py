"""Accelerated models of transformers beside themselves: float64 as truth, twice the original's own error as budget."""

import copy
import io
import pickle
import warnings
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

import fastbert
from fastbert.dropin import layer as dropin_layer
from fastbert.dropin.families import FAMILIES
from fastbert.dropin.forward import Forward
from fastbert.testing import assert_within_budget, relative_rms

transformers = pytest.importorskip("transformers", reason="what is accelerated")

pytestmark = pytest.mark.native

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40,
}  # fmt: skip
WIDTH = 13
HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
         "ForMultipleChoice")  # fmt: skip

# transformers 4's own ALBERT cannot run a group of two layers
GROUP = 2 if int(transformers.__version__.split(".")[0]) >= 5 else 1
# family -> (prefix of its class names, settings of its config beyond SIZES, heads beyond HEADS)
MODELS = {
    "bert": ("Bert", {}, ("ForPreTraining", "ForNextSentencePrediction")),
    "roberta": ("Roberta", {"pad_token_id": 1}, ()),
    "xlm_roberta": ("XLMRoberta", {"pad_token_id": 1}, ()),
    "camembert": ("Camembert", {"pad_token_id": 1}, ()),
    "electra": ("Electra", {"embedding_size": 24}, ("ForPreTraining",)),
    "albert": ("Albert", {"embedding_size": 24, "num_hidden_groups": 2, "inner_group_num": GROUP}, ("ForPreTraining",)),
    "mpnet": ("MPNet", {}, ()),
    "distilbert": ("DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, ()),
    "modernbert": (
        "ModernBert",
        {"num_hidden_layers": 3, "local_attention": 6, "global_attn_every_n_layers": 2, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        (),
    ),
}  # fmt: skip
MASKS = {
    "right": torch.arange(WIDTH) < torch.tensor([WIDTH, 7, 2, 4])[:, None],
    "left": torch.arange(WIDTH) >= WIDTH - torch.tensor([WIDTH, 7, 2, 4])[:, None],
    "holes": torch.arange(WIDTH) % torch.tensor([WIDTH, 2, 3, 5])[:, None] != 1,
    "none": None,
}


def config_of(family: str, **more):
    prefix, settings, _ = MODELS[family]
    sizes = {"vocab_size": 60, "max_position_embeddings": 40} if family == "distilbert" else SIZES
    # ModernBERT's eager attention takes its softmax in float32 whatever the model's dtype, and is NaN in float64
    attention = "sdpa" if family == "modernbert" else "eager"
    settings = {**sizes, **settings, "attn_implementation": attention, **more}
    return getattr(transformers, prefix + "Config")(**settings)


def build(family: str, head: str = "Model", **more) -> torch.nn.Module:
    """A small model in evaluation mode; weights larger than at the start of training, so attention is not uniform."""
    model = getattr(transformers, MODELS[family][0] + head)(config_of(family, **more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model


def batch_of(model: torch.nn.Module, mask: torch.Tensor | None, choices: int = 0) -> dict[str, torch.Tensor]:
    rows = 4 if mask is None else mask.shape[0]
    ids = torch.randint(5, 60, (rows, WIDTH))
    batch = {"input_ids": ids}
    if mask is not None:
        batch = {"input_ids": torch.where(mask, ids, model.config.pad_token_id), "attention_mask": mask.long()}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        batch["token_type_ids"] = torch.randint(0, 2, ids.shape)
    return {name: t.view(2, 2, WIDTH) for name, t in batch.items()} if choices else batch


def labels_of(head: str, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    per_token = torch.randint(0, 2, (4, WIDTH))
    if mask is not None:
        per_token = torch.where(mask, per_token, -100)
    return {
        "ForMaskedLM": {"labels": per_token},
        "ForTokenClassification": {"labels": per_token},
        "ForSequenceClassification": {"labels": torch.randint(0, 2, (4,))},
        "ForNextSentencePrediction": {"labels": torch.randint(0, 2, (4,))},
        "ForMultipleChoice": {"labels": torch.randint(0, 2, (2,))},
        "ForQuestionAnswering": {
            "start_positions": torch.randint(0, 4, (4,)), "end_positions": torch.randint(0, 4, (4,))
        },
        "ForPreTraining": {"labels": per_token},
    }[head]  # fmt: skip


def pretraining_labels(family: str, mask) -> dict[str, torch.Tensor]:
    labels = labels_of("ForPreTraining", mask)
    extra = {"bert": "next_sentence_label", "albert": "sentence_order_label"}.get(family)
    return {**labels, extra: torch.randint(0, 2, (4,))} if extra else {"labels": labels["labels"].clamp(min=0)}


def assert_tensor(ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, name: str) -> None:
    """The budget; a tensor of few numbers may be right by luck, so it has twice that and some roundings more."""
    if truth.numel() >= 64:
        assert_within_budget(ours, plain, truth, name=name)
    else:
        allowed = 4 * relative_rms(plain, truth) + 8 * torch.finfo(plain.dtype).eps
        assert relative_rms(ours, truth) <= allowed, name


def assert_loss(ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    """A single number may be right by luck, so the budget is no smaller than some roundings of its logits."""
    assert relative_rms(ours, truth) <= max(2 * relative_rms(plain, truth), 8 * torch.finfo(dtype).eps)


def three(
    model: torch.nn.Module, dtype: torch.dtype = torch.float32, impl: str = "native", padding: str = "zero"
) -> tuple:
    """(accelerated, plain, truth) with one set of weights."""
    rounded = model.to(dtype)
    ours = fastbert.accelerate(copy.deepcopy(rounded), impl=impl, padding=padding)
    return ours, rounded, copy.deepcopy(rounded).double()


def assert_gradients(ours, plain, truth, losses) -> None:
    """All gradients together within the budget; each alone within what luck may do to one tensor in one batch, where
    `test_every_parameter_within_twice_the_originals_error` looks at many.

    Where the true gradient is zero (softmax does not see a shift of all its scores) only its size is looked at.
    """
    grads = []
    for model, loss in zip((ours, plain, truth), losses, strict=True):
        parameters = dict(model.named_parameters())
        of = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        grads.append(dict(zip(parameters, of, strict=True)))
    assert [name for name, g in grads[0].items() if g is None] == [name for name, g in grads[2].items() if g is None]
    kept = [name for name, g in grads[2].items() if g is not None]
    joined = [torch.cat([g[name].flatten() for name in kept]) for g in grads]
    assert_within_budget(*joined, name="all gradients")
    assert joined[2].isfinite().all()
    size = joined[2].norm()
    eps = torch.finfo(joined[1].dtype).eps
    for name in kept:
        mine, theirs, exact = (g[name].double() for g in grads)
        allowed = 4 * (theirs - exact).norm() + 8 * eps * exact.norm() + eps * size
        assert (mine - exact).norm() <= allowed, name


# the interpreter is slow, and nothing of the kernels differs with other masks: packed, and with a mask
RUNS = [("native", dtype, mask) for dtype in (torch.float32, torch.bfloat16) for mask in MASKS]
RUNS += [("triton", torch.float32, "right"), ("triton", torch.float32, "left")]


@pytest.mark.parametrize(("impl", "dtype", "mask"), RUNS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("family", MODELS)
def test_hidden_states(family, impl, dtype, mask):
    left, mask = mask == "left", MASKS[mask]
    ours, plain, truth = three(build(family), dtype, impl, padding="exact" if left else "zero")
    batch = batch_of(plain, mask)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore" if family == "modernbert" else "error")
        outputs = [model(**batch, output_hidden_states=True) for model in (ours, plain, truth)]
    assert type(outputs[0]) is type(outputs[1])
    assert list(outputs[0].keys()) == list(outputs[1].keys())
    real = torch.ones(4, WIDTH, dtype=torch.bool) if mask is None else mask
    for i, states in enumerate(zip(*(o.hidden_states for o in outputs), strict=True)):
        assert_within_budget(*(s[real] for s in states), name=f"hidden_states[{i}]")
    if "pooler_output" in outputs[0]:
        assert_within_budget(*(o.pooler_output for o in outputs), name="pooler_output")
    if mask is MASKS["right"]:
        assert not outputs[0].last_hidden_state[~mask].any()
    if left:
        assert_within_budget(*(o.last_hidden_state for o in outputs), name="with padding")


@pytest.mark.parametrize("family", ["bert", "albert", "modernbert"])
def test_single_hidden_states(family):
    """A list of places, where transformers knows that: those states of all that there are, and None for the others."""
    output_capturing = pytest.importorskip("transformers.utils.output_capturing", reason="what captures them")
    if not hasattr(output_capturing, "selected_hidden_states"):
        pytest.skip("this transformers returns all states or none")
    ours, plain, _ = three(build(family, **({"inner_group_num": 1} if family == "albert" else {})))
    batch = batch_of(plain, MASKS["right"])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        every = ours(**batch, output_hidden_states=True).hidden_states
        for places in ([0], [1, -1], [-2, 99]):
            a, b = (m(**batch, output_hidden_states=places).hidden_states for m in (ours, plain))
            assert len(a) == len(b) == len(every)
            for mine, theirs, full in zip(a, b, every, strict=True):
                assert (mine is None) == (theirs is None)
                assert mine is None or torch.equal(mine, full)


GRID = [
    pytest.param(family, head, mask, id=f"{family}-{head}-{mask}")
    for family, (_, _, more) in MODELS.items()
    for head in (*HEADS, *more)
    for mask in ("right", "left")
]


@pytest.mark.parametrize(("family", "head", "mask"), GRID)
@pytest.mark.filterwarnings("ignore:.*sliding window.*")
def test_every_head_its_loss_and_every_gradient(family, head, mask):
    mask = MASKS[mask]
    model = build(family, head, num_labels=2).train()  # as trained, but for the dropout
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ours, plain, truth = three(model)
    batch = batch_of(plain, mask, choices=2 if head == "ForMultipleChoice" else 0)
    batch |= pretraining_labels(family, mask) if head == "ForPreTraining" else labels_of(head, mask)
    outputs = [model(**batch) for model in (ours, plain, truth)]
    if not (family == "modernbert" and (mask is MASKS["left"] or head == "ForQuestionAnswering")):
        assert not any(m.forward.warned for m in ours.modules() if isinstance(m.forward, Forward))
    assert_loss(*(o.loss for o in outputs), dtype=torch.float32)
    for name in outputs[0].keys() & {"start_logits", "end_logits", "seq_relationship_logits", "sop_logits"}:
        assert_tensor(*(o[name] for o in outputs), name=name)
    for name in outputs[0].keys() & {"logits", "prediction_logits"}:
        per_token = outputs[0][name].shape[:2] == mask.shape
        assert_tensor(*(o[name][mask] if per_token else o[name] for o in outputs), name=name)
    assert_gradients(ours, plain, truth, [o.loss for o in outputs])


SEEDS = 3


def samples(family: str, dtype: torch.dtype):
    """(parameter, ours - truth, original's - truth, truth, size of the whole gradient) in float64, over heads, paddings
    and seeds."""
    for head in (*HEADS, *MODELS[family][2]):
        for seed in range(SEEDS):
            for side in ("right", "left"):
                torch.manual_seed(seed)
                mask = MASKS[side]
                model = build(family, head, num_labels=2)
                batch = batch_of(model, mask, choices=2 if head == "ForMultipleChoice" else 0)
                batch |= pretraining_labels(family, mask) if head == "ForPreTraining" else labels_of(head, mask)
                found = []
                for of in three(model, dtype):
                    parameters = dict(of.named_parameters())
                    grads = torch.autograd.grad(of(**batch).loss, list(parameters.values()), allow_unused=True)
                    found.append({n: g.double() for n, g in zip(parameters, grads, strict=True) if g is not None})
                ours, plain, truth = found
                assert ours.keys() == plain.keys() == truth.keys()
                size = torch.stack([g.norm() for g in truth.values()]).norm()
                for name, exact in truth.items():
                    key = name.removeprefix(model.base_model_prefix + ".")
                    if exact.numel() < 16:  # a bias of two labels is luck even over several batches
                        key = "all that are of fewer than 16 numbers"
                    yield key, ours[name] - exact, plain[name] - exact, exact, size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.filterwarnings("ignore:.*sliding window.*")
def test_every_parameter_within_twice_the_originals_error(family, dtype):
    """One batch says little of one parameter: rounding errors are random, and the original's may be small by luck. So
    their squares are added up, over a family's heads, paddings and seeds, before they are compared."""
    mine, theirs, true = defaultdict(float), defaultdict(float), defaultdict(float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for name, error, plain_error, exact, size in samples(family, dtype):
            mine[name] += float((error.norm() / size) ** 2)
            theirs[name] += float((plain_error.norm() / size) ** 2)
            true[name] += float((exact.norm() / size) ** 2)
    wrong = {}
    for name in mine:
        allowed = 2 * theirs[name] ** 0.5
        if true[name] ** 0.5 < 1e-9:  # a shift of all scores, which softmax does not see: nothing to be relative to
            allowed += torch.finfo(dtype).eps / 8
        if not mine[name] ** 0.5 <= allowed:
            wrong[name] = f"{mine[name] ** 0.5:.1e}, allowed {allowed:.1e}, of {true[name] ** 0.5:.1e}"
    assert not wrong
    assert len(mine) > 15


@pytest.mark.parametrize("family", MODELS)
def test_gradients_in_bfloat16(family):
    ours, plain, truth = three(build(family), torch.bfloat16)
    mask = MASKS["right"]
    batch, dy = batch_of(plain, mask), torch.randn(int(mask.sum()), 32)
    losses = [(model(**batch).last_hidden_state[mask] * dy.to(model.dtype)).sum() for model in (ours, plain, truth)]
    assert_gradients(ours, plain, truth, losses)


@pytest.mark.triton
@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert", "albert"])
def test_gradients_through_the_kernels(family):
    ours, plain, truth = three(build(family, num_hidden_layers=2), impl="triton")
    mask = MASKS["right"][:3, :7]
    batch = {name: t[:3, :7] for name, t in batch_of(plain, MASKS["right"]).items()}
    dy = torch.randn(int(mask.sum()), 32)
    losses = [(model(**batch).last_hidden_state[mask] * dy.to(model.dtype)).sum() for model in (ours, plain, truth)]
    assert_gradients(ours, plain, truth, losses)


# ---- what reads padding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("mask", ["right", "left"])
@pytest.mark.filterwarnings("ignore:.*sliding window.*")
def test_logits_of_labelled_tokens_alone(family, mask):
    """Asked for: the same loss and gradients, and of the logits the rows that have a label. By default all rows."""
    mask = MASKS[mask]
    model = build(family, "ForMaskedLM")
    labels = torch.where(torch.rand(4, WIDTH) < 0.3, torch.randint(0, 60, (4, WIDTH)), -100)
    labels[0, 1] = 3
    batch = batch_of(model, mask)
    _, plain, truth = three(model)
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native", padding="zero", labelled_logits=True)
    outputs = [one(**batch, labels=labels) for one in (ours, plain, truth)]
    of_label = [outputs[0].logits, *(output.logits[labels != -100][None] for output in outputs[1:])]
    assert of_label[0].shape[:2] == (1, int((labels != -100).sum()))
    assert_tensor(*of_label, "logits")
    losses = [output.loss for output in outputs]
    assert_loss(*losses, torch.float32)
    assert_gradients(ours, plain, truth, losses)
    assert ours(**batch).logits.shape == outputs[1].logits.shape
    asked = ours(**batch, labels=labels, output_hidden_states=True, return_dict=False)
    assert asked[1].shape == of_label[0].shape
    assert "of these alone" in str(fastbert.explain(ours))


@pytest.mark.filterwarnings("ignore:.*leaves this call.*")
def test_logits_of_labelled_tokens_where_the_encoder_runs_its_own_code():
    """A sequence without a token sends the call there."""
    model, mask = build("bert", "ForMaskedLM"), MASKS["right"].clone()
    mask[0] = False
    batch, labels = batch_of(model, mask), torch.full((4, WIDTH), -100)
    labels[1, 2], labels[3, 0] = 7, 9
    ours = fastbert.accelerate(copy.deepcopy(model), labelled_logits=True)
    expected = model(**batch, labels=labels)
    for return_dict in (True, False):
        found = ours(**batch, labels=labels, return_dict=return_dict)
        torch.testing.assert_close(found[0], expected.loss)
        torch.testing.assert_close(found[1], expected.logits[labels != -100][None])


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.filterwarnings("ignore:.*sliding window.*")
def test_labels_of_another_shape_are_the_originals(family):
    """Rows are picked by labels [batch, tokens] alone: of others the places would be those of other tokens."""
    model = build(family, "ForMaskedLM")
    batch = batch_of(model, MASKS["right"])
    ours = fastbert.accelerate(copy.deepcopy(model), impl="native", labelled_logits=True)
    labels = torch.full((4, WIDTH), -100)
    labels[0, 1], labels[2, 0] = 7, 9
    expected, found = (one(**batch, labels=labels.flatten()) for one in (model, ours))
    assert found.logits.shape == expected.logits.shape
    torch.testing.assert_close(found.loss, expected.loss)
    for one in (model, ours):
        with pytest.raises(ValueError, match="batch_size"):
            one(**batch, labels=labels[:, :-1].contiguous())


def test_labels_at_padding_count_as_they_did():
    """`labels = input_ids` is common, and then padding has labels too: their loss must not change in silence."""
    ours, plain, truth = three(build("bert", "ForMaskedLM"))
    batch = batch_of(plain, MASKS["right"])
    outputs = [model(**batch, labels=batch["input_ids"]) for model in (ours, plain, truth)]
    assert_loss(*(o.loss for o in outputs), dtype=torch.float32)


def test_a_sequence_without_tokens_is_left_to_the_original():
    ours, plain, _ = three(build("bert"))
    batch = batch_of(plain, MASKS["right"])
    batch["attention_mask"][2] = 0
    with pytest.warns(UserWarning, match="a sequence has no token"), torch.no_grad():
        assert torch.equal(ours(**batch).last_hidden_state, plain(**batch).last_hidden_state)


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "modernbert"])
def test_embeddings_in_place_of_ids(family):
    ours, plain, truth = three(build(family))
    mask, embeds = MASKS["right"], torch.randn(4, WIDTH, 32)
    for more in ({}, {"attention_mask": mask}):
        real = mask if more else torch.ones_like(mask)
        outputs = [m(inputs_embeds=embeds.to(m.dtype), **more).last_hidden_state[real] for m in (ours, plain, truth)]
        assert_within_budget(*outputs)


def test_position_ids():
    ours, plain, truth = three(build("bert"))
    batch = batch_of(plain, MASKS["right"]) | {"position_ids": torch.randint(0, 40, (4, WIDTH))}
    assert_within_budget(*(m(**batch).pooler_output for m in (ours, plain, truth)))


# ---- what it leaves to the original ----------------------------------------------------------------------

FALLBACKS = {
    "output_attentions": ("bert", {"output_attentions": True}, "output_attentions was given"),
    "mask_4d": ("bert", {"attention_mask": torch.ones(4, 1, WIDTH, WIDTH).tril().bool()}, r"not \[batch, tokens\]"),
    "encoder_hidden_states": ("bert", {"encoder_hidden_states": torch.zeros(4, 3, 32)}, "encoder_hidden_states was"),
    "single_states": ("bert", {"output_hidden_states": 1}, "single hidden states"),
    "rotary_position_ids": ("modernbert", {"position_ids": torch.arange(WIDTH)[None] * 2}, "rotary positions"),
}


@pytest.mark.parametrize(("family", "more", "reason"), FALLBACKS.values(), ids=FALLBACKS.keys())
def test_fallback_warns_once_and_is_the_original(family, more, reason):
    ours, plain, _ = three(build(family))
    batch = batch_of(plain, None) | more
    with torch.no_grad():
        with pytest.warns(UserWarning, match=reason):
            first = ours(**batch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = ours(**batch)
        expected = plain(**batch)
    for output in (first, again):
        assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert list(first.keys()) == list(expected.keys())
    assert reason.replace("\\", "") in str(fastbert.explain(ours))


def test_a_hook_inside_is_heard():
    """Modules that the fused code walks past must not fall silent."""
    ours, plain, _ = three(build("bert"))
    heard = []
    handle = ours.encoder.layer[1].attention.self.register_forward_hook(lambda *_: heard.append(1))
    with pytest.warns(UserWarning, match="BertSelfAttention has a hook"), torch.no_grad():
        ours(**batch_of(plain, None))
    assert heard
    handle.remove()
    with torch.no_grad():
        ours(**batch_of(plain, None))
    assert len(heard) == 1


def test_a_hook_on_a_linear_layer_sees_what_the_original_shows():
    ours, plain, _ = three(build("bert"))
    shapes = []
    ours.encoder.layer[0].intermediate.dense.register_forward_hook(lambda _, __, out: shapes.append(out.shape))
    batch = batch_of(plain, MASKS["right"])
    with pytest.warns(UserWarning, match="a Linear has a hook"):
        output = ours(**batch)
    assert torch.equal(output.last_hidden_state, plain(**batch).last_hidden_state)
    assert shapes == [(4, WIDTH, 48)]
    assert "encoder.layer.0.intermediate.dense" in fastbert.explain(ours).left


def test_too_long_for_the_position_table_raises_as_before():
    ours = fastbert.accelerate(build("bert"), impl="native")
    with pytest.warns(UserWarning, match="41 tokens"), pytest.raises(Exception):  # noqa: B017, PT011
        ours(torch.ones(1, 41, dtype=torch.long))


def test_decoder_is_left_alone():
    model = build("bert", "LMHeadModel", is_decoder=True)
    with pytest.warns(UserWarning, match="replaced nothing"):
        fastbert.accelerate(model, impl="native")
    assert "it is a decoder" in str(fastbert.explain(model))


def test_unknown_model_is_left_alone():
    with pytest.warns(UserWarning, match="replaced nothing"):
        fastbert.accelerate(torch.nn.Linear(2, 2))


def test_bad_impl():
    with pytest.raises(ValueError, match="impl must be one of"):
        fastbert.accelerate(build("bert"), impl="cuda")


# ---- adapters --------------------------------------------------------------------------------------------


class LowRank(torch.nn.Module):
    """A LoRA adapter as PEFT makes them: a module around the linear layer, which it calls."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base_layer = base
        self.a = torch.nn.Linear(base.in_features, 2, bias=False)
        self.b = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


@pytest.mark.parametrize("parts", [("query", "value"), ("dense",)], ids=["query_value", "every_dense"])
def test_adapters_on_linear_layers_are_called(parts):
    model = build("bert")
    for path, module in list(model.named_modules()):
        if path.split(".")[-1] in parts and "pooler" not in path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, LowRank(module))
    ours, plain, truth = three(model)
    batch = batch_of(plain, MASKS["right"])
    losses = [m(**batch).pooler_output.square().sum() for m in (ours, plain, truth)]
    assert_gradients(ours, plain, truth, losses)
    assert "a LowRank" in str(fastbert.explain(ours))


# ---- the model stays what it was -------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
def test_restore_is_exact(family):
    plain = build(family, "ForSequenceClassification")
    state = {name: t.clone() for name, t in plain.state_dict().items()}
    parameters = {name: id(p) for name, p in plain.named_parameters()}
    batch = batch_of(plain, MASKS["right"])
    with torch.no_grad():
        before = plain(**batch).logits
        accelerated = fastbert.accelerate(plain, impl="native")
        assert accelerated is plain
        accelerated(**batch)
        assert {name: id(p) for name, p in plain.named_parameters()} == parameters
        assert list(plain.state_dict()) == list(state)
        assert fastbert.restore(plain) is plain
        assert torch.equal(plain(**batch).logits, before)
    assert not any("forward" in m.__dict__ for m in plain.modules())
    assert all(torch.equal(t, state[name]) for name, t in plain.state_dict().items())


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "after_a_call"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
                         ids=["deepcopy", "pickle", "torch.save"])  # fmt: skip
@pytest.mark.parametrize("family", MODELS)
def test_a_copy_is_a_model_of_its_own(family, duplicate, called):
    ours = fastbert.accelerate(build(family, "ForSequenceClassification"), impl="native")
    batch = batch_of(ours, MASKS["right"])
    with torch.no_grad():
        if called:
            ours(**batch)
        other = duplicate(ours)
        expected = ours(**batch).logits
        assert torch.equal(other(**batch).logits, expected)
        for p in ours.parameters():
            p.zero_()
        assert torch.equal(other(**batch).logits, expected)
    mine = {id(m) for m in other.modules()}
    forwards = [m.__dict__["forward"] for m in other.modules() if "forward" in m.__dict__]
    assert forwards
    assert all(isinstance(f, Forward) and id(f.module) in mine for f in forwards)


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "after_a_call"])
@pytest.mark.parametrize("family", MODELS)
def test_save_and_load(family, called, tmp_path):
    ours = fastbert.accelerate(build(family, "ForSequenceClassification"), impl="native")
    batch = batch_of(ours, MASKS["right"])
    if called:
        ours(**batch)
    ours.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(ours)
    torch.testing.assert_close(loaded(**batch).logits, ours(**batch).logits, atol=1e-4, rtol=1e-4)
    assert not any("forward" in m.__dict__ for m in loaded.modules())


def test_signature_is_the_original_one():
    import inspect

    model = build("bert")
    before = inspect.signature(model.forward)
    assert inspect.signature(fastbert.accelerate(model, impl="native").forward) == before


def test_tuples():
    ours, plain, _ = three(build("bert"))
    batch = batch_of(plain, MASKS["right"])
    a, b = (m(**batch, return_dict=False, output_hidden_states=True) for m in (ours, plain))
    assert [type(t) for t in a] == [type(t) for t in b]
    for family in ("bert", "mpnet"):
        ours, plain, _ = three(build(family, "ForTokenClassification"))
        a, b = (m(**batch_of(plain, None), return_dict=False) for m in (ours, plain))
        assert [t.shape for t in a] == [t.shape for t in b]


def test_resized_embeddings_are_used():
    ours = fastbert.accelerate(build("bert", "ForMaskedLM"), impl="native")
    ours.resize_token_embeddings(70)
    plain = fastbert.restore(copy.deepcopy(ours))
    batch = {"input_ids": torch.full((2, 5), 69)}
    torch.testing.assert_close(ours(**batch).logits, plain(**batch).logits)


def test_accelerate_twice_is_accelerate_once():
    model = fastbert.accelerate(fastbert.accelerate(build("bert"), impl="native"), impl="reference")
    assert model.forward.impl == "reference"
    fastbert.restore(model)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_modernbert_on_a_flash_attention_of_its_own_is_left_alone():
    model = build("modernbert")
    if not hasattr(model.layers[0].attn, "rotary_emb"):
        pytest.skip("this transformers calls flash attention as it calls any other")
    model.config._attn_implementation = "flash_attention_2"
    assert "runs packed already" in str(fastbert.explain(model))


def test_a_row_by_analogy_with_other_positions_is_refused(monkeypatch):
    """Data2VecText has BERT's layers and RoBERTa's positions. A row for it copied from BERT's took the columns for
    positions, and every state was 4e-2 off without a word."""
    row = FAMILIES["RobertaModel"]
    monkeypatch.setitem(FAMILIES, "RobertaModel", replace(row, positions="column"))
    model = build("roberta")
    with pytest.warns(UserWarning, match="padding_idx"):
        fastbert.accelerate(model, impl="native")
    assert "count positions from padding_idx" in str(fastbert.explain(model))


def test_explain_names_every_layer():
    report = fastbert.explain(fastbert.accelerate(build("bert", "ForSequenceClassification"), impl="native"))
    assert report.replaced["bert.encoder.layer.0"] == (
        "BertLayer: q, k, v in one product, attention, feed_forward, add_layer_norm"
    )
    assert "bert.pooler" in report.left
    restored = fastbert.explain(build("bert"))
    assert not restored.replaced
    assert "not accelerated" in str(restored)


# ---- training --------------------------------------------------------------------------------------------


def losses_of(model: torch.nn.Module, batch: dict, steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.filterwarnings("ignore")
def test_gradient_checkpointing_changes_nothing_but_memory(reentrant):
    """With dropout on: the recomputed layer draws the same masks, because they are a function of the seed."""
    model = build("bert", "ForSequenceClassification", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    ours = fastbert.accelerate(model, impl="native").train()
    ours.enable_input_require_grads()  # checkpointing does that too: a hook, for which the word table is called
    checkpointed = copy.deepcopy(ours)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    batch = batch_of(ours, MASKS["right"]) | {"labels": torch.randint(0, 2, (4,))}
    runs = defaultdict(int)

    def counted(name):
        original = getattr(dropin_layer, name)

        def call(*args):
            runs[name] += 1
            return original(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("run", "run_for_first"):
            patch.setattr(dropin_layer, name, counted(name))
        once = losses_of(checkpointed, batch, steps=1)
    # forward and again in the backward pass: the first layer, and the last, of which the head reads first tokens alone
    assert runs == {"run": 2, "run_for_first": 2}
    torch.testing.assert_close(once, losses_of(ours, batch, steps=1))


def test_dropout_drops():
    model = build("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    ours = fastbert.accelerate(model, impl="native").train()
    batch = batch_of(ours, MASKS["right"])

    def run(seed):
        torch.manual_seed(seed)
        return ours(**batch).last_hidden_state

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    mean = torch.stack([run(seed).detach() for seed in range(200)]).mean(0)
    theirs = fastbert.restore(copy.deepcopy(ours))
    other = torch.stack([theirs(**batch).last_hidden_state.detach() for _ in range(200)]).mean(0)
    assert relative_rms(mean[MASKS["right"]], other[MASKS["right"]]) < 0.2


def test_dropout_of_a_model_that_evaluates():
    """Monte Carlo dropout: the model is in evaluation mode, its dropout modules are not."""
    ours = fastbert.accelerate(build("bert", hidden_dropout_prob=0.3), impl="native")
    batch = batch_of(ours, MASKS["right"])
    outputs = []
    for on in (False, True, True, False):
        for module in ours.modules():
            if isinstance(module, torch.nn.Dropout):
                module.train(on)
        outputs.append(ours(**batch).last_hidden_state)
    assert torch.equal(outputs[0], outputs[3])
    assert not any(torch.equal(a, b) for a, b in ((outputs[0], outputs[1]), (outputs[1], outputs[2])))


@pytest.mark.parametrize("family", ["bert", "electra", "modernbert"])
def test_autocast(family):
    """The sum that goes through the layers has the dtype of what goes into them: bfloat16 behind ELECTRA's projection,
    float32 behind a LayerNorm."""
    ours, plain, truth = three(build(family))
    batch, mask = batch_of(plain, MASKS["right"]), MASKS["right"]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [m(**batch).last_hidden_state for m in (ours, plain)]
    assert outputs[0].dtype == outputs[1].dtype
    assert_within_budget(*(o[mask] for o in (*outputs, truth(**batch).last_hidden_state)))


@pytest.mark.parametrize("family", ["bert", "mpnet"])
@pytest.mark.filterwarnings("ignore")
def test_compiles_in_one_graph(family):
    """Whole, with its loss, for changing lengths, with and without a mask; and its gradients are the same."""
    model = build(family, "ForSequenceClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ours = fastbert.accelerate(model, impl="native")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for mask in ("none", "right"):
        batch = batch_of(ours, MASKS[mask]) | {"labels": torch.tensor([0, 1, 1, 0])}
        losses = [of(**batch).loss for of in (compiled, ours)]
        torch.testing.assert_close(*losses)
        grads = [torch.autograd.grad(loss, list(ours.parameters())[:20], allow_unused=True) for loss in losses]
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-3)


def test_trainer_draws_the_same_loss_curve(tmp_path):
    """20 steps of transformers' Trainer from one seed, dropout off: float64 is the truth of the curve."""
    pytest.importorskip("accelerate", reason="Trainer needs it")
    model = build("bert", "ForSequenceClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    texts = [torch.randint(5, 60, (int(n),)) for n in torch.randint(3, WIDTH, (48,))]
    examples = [{"input_ids": text.tolist(), "labels": int(text.sum()) % 2} for text in texts]

    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(),
                "labels": torch.tensor([row["labels"] for row in rows])}  # fmt: skip

    def curve(of: torch.nn.Module) -> torch.Tensor:
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=20, learning_rate=1e-3, logging_steps=1, report_to="none", use_cpu=True, seed=5,
            per_device_train_batch_size=8, save_strategy="no", disable_tqdm=True, optim="sgd",
        )  # fmt: skip
        losses = []

        class Recorder(transformers.Trainer):
            def compute_loss(self, model, inputs, *args, **kwargs):  # the log rounds to four digits
                loss = super().compute_loss(model, inputs, *args, **kwargs)
                losses.append(loss.item())
                return loss

        Recorder(of, arguments, train_dataset=examples, data_collator=collate).train()
        return torch.tensor(losses, dtype=torch.float64)

    ours, plain, truth = three(model)
    curves = [curve(m) for m in (ours, plain, truth)]
    assert len(curves[0]) == 20
    assert curves[2][0] != curves[2][-1]
    assert relative_rms(curves[0], curves[2]) <= 2 * relative_rms(curves[1], curves[2]) + 1e-6


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
@pytest.mark.filterwarnings("ignore")
def test_data_parallel_wrappers(wrap, one_process):
    """Layers are called as modules, so what gathers a sharded one before its forward still does."""
    ours, plain, _ = three(build("bert", "ForSequenceClassification"))
    batch = batch_of(plain, MASKS["right"]) | {"labels": torch.randint(0, 2, (4,))}
    if wrap == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(ours)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (1,))
        for layer in ours.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(ours, mesh=mesh)
    loss, expected = wrapped(**batch).loss, plain(**batch).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert not ours.bert.forward.warned
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            mine = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            torch.testing.assert_close(mine, q.grad, atol=1e-5, rtol=1e-3, msg=name)
