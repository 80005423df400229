"""Accelerated models of transformers, compared with the originals: at most twice their error against float64."""

import copy
import warnings
from collections import defaultdict

import pytest
import torch

import fastbert
from dropin_models import (
    HEADS,
    MASKS,
    MODELS,
    SIZES,
    WIDTH,
    assert_gradients,
    assert_tensor,
    batch_of,
    build,
    labels_of,
    three,
)
from fastbert.dropin.forward import Forward
from fastbert.testing import assert_within_budget, relative_rms

transformers = pytest.importorskip("transformers", reason="its models are accelerated")
pytestmark = pytest.mark.native


def pretraining_labels(family: str, mask) -> dict[str, torch.Tensor]:
    labels = labels_of("ForPreTraining", mask)
    extra = {"bert": "next_sentence_label", "albert": "sentence_order_label"}.get(family)
    return {**labels, extra: torch.randint(0, 2, (4,))} if extra else {"labels": labels["labels"].clamp(min=0)}


def assert_loss(ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    """A single number may be right by luck, so the budget is at least some roundings of its logits."""
    assert relative_rms(ours, truth) <= max(2 * relative_rms(plain, truth), 16 * torch.finfo(dtype).eps)


# the interpreter is slow, and other masks run the same kernels: without a mask, and with one
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
    """Newer transformers take a list of layers, and return these states and None for the others."""
    output_capturing = pytest.importorskip("transformers.utils.output_capturing", reason="captures them")
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
    model = build(family, head, num_labels=2).train()  # trains, but without dropout
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
    """For each parameter (ours - truth, original's - truth, truth, size of the whole gradient) in float64, over heads,
    paddings and seeds."""
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
                    if exact.numel() < 16:  # a bias of two labels depends on luck even over several batches
                        key = "all of fewer than 16 numbers"
                    yield key, ours[name] - exact, plain[name] - exact, exact, size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.filterwarnings("ignore:.*sliding window.*")
def test_every_parameter_within_twice_the_originals_error(family, dtype):
    """One batch says little about one parameter: rounding errors are random, and the original's may be small by luck.
    So squared errors are summed over a family's heads, paddings and seeds before they are compared."""
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
        if true[name] ** 0.5 < 1e-9:  # zero, because a shift of all scores does not change a softmax
            allowed += torch.finfo(dtype).eps / 8
        if not mine[name] ** 0.5 <= allowed:
            wrong[name] = f"{mine[name] ** 0.5:.1e}, allowed {allowed:.1e}, of {true[name] ** 0.5:.1e}"
    assert not wrong
    assert len(mine) > 15


@pytest.mark.parametrize("family", MODELS)
def test_gradients_in_bfloat16(family):
    ours, plain, truth = three(build(family), torch.bfloat16)
    mask = MASKS["right"]
    batch, dy = batch_of(plain, mask), torch.randn(int(mask.sum()), SIZES["hidden_size"])
    losses = [(model(**batch).last_hidden_state[mask] * dy.to(model.dtype)).sum() for model in (ours, plain, truth)]
    assert_gradients(ours, plain, truth, losses)


@pytest.mark.triton
@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert", "albert"])
def test_gradients_through_the_kernels(family):
    ours, plain, truth = three(build(family, num_hidden_layers=2), impl="triton")
    mask = MASKS["right"][:3, :7]
    batch = {name: t[:3, :7] for name, t in batch_of(plain, MASKS["right"]).items()}
    dy = torch.randn(int(mask.sum()), SIZES["hidden_size"])
    losses = [(model(**batch).last_hidden_state[mask] * dy.to(model.dtype)).sum() for model in (ours, plain, truth)]
    assert_gradients(ours, plain, truth, losses)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("mask", ["right", "left"])
@pytest.mark.filterwarnings("ignore:.*sliding window.*")
def test_logits_of_labelled_tokens_only(family, mask):
    """Optional: the same loss and gradients, but logits only for rows that have a label. The default is all rows."""
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
    assert "of these only" in str(fastbert.explain(ours))


@pytest.mark.filterwarnings("ignore:.*leaves this call.*")
def test_logits_of_labelled_tokens_where_the_encoder_runs_its_own_code():
    """Because of a sequence without a token."""
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
def test_labels_of_another_shape_behave_as_in_the_original(family):
    """Only labels of shape [batch, tokens] select rows; labels of another shape belong to other tokens."""
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


def test_labels_at_padding_count_as_in_the_original():
    """`labels = input_ids` is common and gives padding labels too: the loss must include them."""
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
    mask, embeds = MASKS["right"], torch.randn(4, WIDTH, SIZES["hidden_size"])
    for more in ({}, {"attention_mask": mask}):
        real = mask if more else torch.ones_like(mask)
        outputs = [m(inputs_embeds=embeds.to(m.dtype), **more).last_hidden_state[real] for m in (ours, plain, truth)]
        assert_within_budget(*outputs)


def test_position_ids():
    ours, plain, truth = three(build("bert"))
    batch = batch_of(plain, MASKS["right"]) | {"position_ids": torch.randint(0, 40, (4, WIDTH))}
    assert_within_budget(*(m(**batch).pooler_output for m in (ours, plain, truth)))
