"""Heads compared with transformers' own: same weights, same input, a budget of twice its error against float64."""

import copy
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import fastbert
from fastbert import BertConfig, PackedBatch
from fastbert.testing import TINY, allowed_factor, assert_within_budget, relative_rms

transformers = pytest.importorskip("transformers", reason="compared with transformers")

SIZES = {
    "vocab_size": 91, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "max_position_embeddings": 40,
}  # fmt: skip
TEXTS, WIDTH = 6, 13
LENGTHS = (13, 5, 1, 9, 12, 7)


@dataclass
class Kind:
    """A head and its labels by name: "text" and "token" are a class for each, "element" a number for each."""

    head: str
    labels: dict[str, tuple[str, int]]
    config: dict[str, Any] = field(default_factory=dict)
    logits: tuple[str, ...] = ("logits",)


KINDS = {
    "single_label": Kind("SequenceClassification", {"labels": ("text", 3)}, {"num_labels": 3}),
    "multi_label": Kind(
        "SequenceClassification", {"labels": ("binary", 4)},
        {"num_labels": 4, "problem_type": "multi_label_classification"},
    ),
    "regression": Kind("SequenceClassification", {"labels": ("number", 1)}, {"num_labels": 1}),
    "tokens": Kind("TokenClassification", {"labels": ("token", 5)}, {"num_labels": 5}),
    "spans": Kind(
        "QuestionAnswering", {"start_positions": ("place", 0), "end_positions": ("place", 0)},
        logits=("start_logits", "end_logits"),
    ),
    "choices": Kind("MultipleChoice", {"labels": ("choice", 2)}),
    "words": Kind("MaskedLM", {"labels": ("token", 91)}),
    "next_sentence": Kind("NextSentencePrediction", {"labels": ("text", 2)}),
    "pretraining": Kind(
        "PreTraining", {"labels": ("token", 91), "next_sentence_label": ("text", 2)},
        logits=("prediction_logits", "seq_relationship_logits"),
    ),
}  # fmt: skip
CHOICES = 2


def config_of(kind: Kind, dropout: float = 0.0) -> BertConfig:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertConfig(**SIZES, **rates, **kind.config)


def ours_of(kind: Kind, impl: str = "native", dropout: float = 0.0) -> torch.nn.Module:
    """With weights larger than initial ones, so that attention is not uniform and every bias counts."""
    model = getattr(fastbert, f"BertFor{kind.head}")(config_of(kind, dropout), impl=impl).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model


def theirs_of(kind: Kind, ours: torch.nn.Module) -> torch.nn.Module:
    config = transformers.BertConfig(**ours.config.to_dict(), attn_implementation="eager")
    model = getattr(transformers, f"BertFor{kind.head}")(config).eval()
    model.load_state_dict(ours.state_dict())
    return model


def padded_batch(kind: Kind) -> dict[str, torch.Tensor]:
    """TEXTS texts of LENGTHS, with labels, some of which do not count."""
    mask = (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]).long()
    batch = {"input_ids": torch.randint(1, 91, (TEXTS, WIDTH)), "attention_mask": mask}
    batch["token_type_ids"] = torch.randint(0, 2, (TEXTS, WIDTH))
    for name, (what, classes) in kind.labels.items():
        if what == "token":
            labels = torch.randint(0, classes, (TEXTS, WIDTH)).masked_fill(torch.rand(TEXTS, WIDTH) < 0.4, -100)
            batch[name] = labels.masked_fill(mask == 0, -100)
        elif what == "place":
            batch[name] = torch.tensor([int(torch.randint(0, length, ())) for length in LENGTHS])
            batch[name][1] = WIDTH + 3  # beyond the end, so it does not count
        elif what in ("binary", "number"):
            batch[name] = (
                torch.randn(TEXTS, classes) if what == "number" else torch.randint(0, 2, (TEXTS, classes)) * 1.0
            )
        else:
            batch[name] = torch.randint(0, classes, (TEXTS // CHOICES if what == "choice" else TEXTS,))
    return batch


def for_theirs(kind: Kind, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' multiple choice needs a dimension for the choices."""
    if kind.head != "MultipleChoice":
        return batch
    return {name: t if name in kind.labels else t.unflatten(0, (-1, CHOICES)) for name, t in batch.items()}


def packed_batch(kind: Kind, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The same batch for our heads, packed from lists."""
    real = batch["attention_mask"].bool()
    lists = [[row[keep].tolist() for row, keep in zip(batch[name], real, strict=True)]
             for name in ("input_ids", "token_type_ids")]  # fmt: skip
    given = {"input_ids": PackedBatch.from_lists(*lists)}
    for name, (what, _) in kind.labels.items():
        given[name] = batch[name][real] if what == "token" else batch[name]
    return given | ({"num_choices": CHOICES} if kind.head == "MultipleChoice" else {})


def loss_of_theirs(kind: Kind, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers' loss; for spans the mean over single texts, because its softmax includes padding."""
    if kind.head != "QuestionAnswering":
        return model(**for_theirs(kind, batch)).loss
    losses = []
    for row, length in enumerate(LENGTHS):
        one = {name: t[row : row + 1] for name, t in batch.items()}
        one |= {name: one[name][:, :length] for name in ("input_ids", "attention_mask", "token_type_ids")}
        losses.append(model(**one).loss)
    return torch.stack([loss for row, loss in enumerate(losses) if row != 1]).mean()


def cast(batch: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}


each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


BATCHES = 16  # enough losses for a comparison


def losses_and_gradients(run, model: torch.nn.Module, batches: list) -> dict[str, torch.Tensor]:
    """Name -> results of `run(model, batch)`: the losses of all batches, and for the first twelve each of the encoder's
    gradients, and the head's as one, since some are single numbers, in which the plain model may be right by luck."""
    found = defaultdict(list)
    for number, batch in enumerate(batches):
        model.zero_grad()
        loss = run(model, batch)
        found["losses"].append(loss.detach().reshape(1))
        if number < 12:
            loss.backward()
            for name, p in model.named_parameters():
                # keys' biases do not change a softmax: their gradient is only rounding
                if not name.endswith("attention.self.key.bias"):
                    found[name if name.startswith("bert.") else "head"].append(p.grad.flatten())
    return {name: torch.cat([t.double() for t in tensors]) for name, tensors in found.items()}


def expect_within_budget(found: dict[str, dict[str, torch.Tensor]], factor: float) -> None:
    """found: the results of "ours", "plain" and "truth"."""
    assert found["ours"].keys() == found["truth"].keys()
    for name, truth in found["truth"].items():
        error, plain = (relative_rms(found[who][name], truth) for who in ("ours", "plain"))
        allowed = factor * plain + TINY
        assert error <= allowed, f"{name}: relative RMS error {error:.2e}, budget {allowed:.2e}"


@pytest.mark.parametrize(
    ("name", "impl", "dtype"),
    [
        *((name, "native", torch.float32) for name in KINDS),
        *((name, "native", torch.bfloat16) for name in KINDS),
        # the interpreter is slow, and only the loss over the vocabulary has kernels of its own
        ("words", "triton", torch.float32),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_loss_and_every_gradient_match_transformers(name, impl, dtype):
    """A training step without dropout, on packed input."""
    kind = KINDS[name]
    ours = ours_of(kind, impl)
    theirs = theirs_of(kind, ours).to(dtype)
    truth = copy.deepcopy(theirs).double()
    batches = [padded_batch(kind) for _ in range(BATCHES if impl == "native" else 1)]
    found = {
        "ours": losses_and_gradients(lambda m, b: m(**packed_batch(kind, b)).loss, ours.to(dtype).train(), batches),
        "plain": losses_and_gradients(lambda m, b: loss_of_theirs(kind, m, cast(b, dtype)), theirs, batches),
        "truth": losses_and_gradients(lambda m, b: loss_of_theirs(kind, m, cast(b, torch.float64)), truth, batches),
    }
    expect_within_budget(found, allowed_factor(dtype))


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_loss_and_every_gradient_with_dropout(kind, dtype):
    """The reference implementation draws the same masks from the same seeds, so it replaces transformers."""
    ours = ours_of(kind, dropout=0.2)
    plain = type(ours)(ours.config, impl="reference")
    plain.load_state_dict(ours.state_dict())
    models = {"ours": ours.to(dtype), "plain": plain.to(dtype), "truth": copy.deepcopy(plain).double()}
    batches = [padded_batch(kind) for _ in range(BATCHES)]
    found = {}
    for name, model in models.items():
        torch.manual_seed(7)  # each pass draws the seeds of its masks from this generator
        found[name] = losses_and_gradients(lambda m, b: m(**packed_batch(kind, b)).loss, model.train(), batches)
    expect_within_budget(found, 2.0)
    torch.manual_seed(7)
    again = ours(**for_theirs(kind, batches[0])).loss
    assert relative_rms(again.reshape(1), found["ours"]["losses"][:1]) < 1e-2, "padded input has other masks"
    assert not torch.equal(again, ours(**for_theirs(kind, batches[0])).loss), "a new pass needs a new mask"


@each_kind
def test_outputs_match_transformers(kind):
    """Logits, hidden states and attentions, by name, by index and as a tuple."""
    ours = ours_of(kind)
    theirs = theirs_of(kind, ours)
    batch = {name: t for name, t in padded_batch(kind).items() if name not in kind.labels}
    real = batch["attention_mask"].bool()
    wanted = {"output_hidden_states": True, "output_attentions": True}
    output, expected = (model(**for_theirs(kind, batch), **wanted) for model in (ours, theirs))
    truth = copy.deepcopy(theirs).double()(**for_theirs(kind, batch), **wanted)
    assert list(output) == list(expected)
    for name in kind.logits:
        values = [o[name] for o in (output, expected, truth)]
        if values[0].shape[:2] == real.shape and kind.head != "NextSentencePrediction":
            values = [value[real] for value in values]
        assert_within_budget(*values, name=name)
    for name in ("hidden_states", "attentions"):
        assert len(output[name]) == len(expected[name])
        for ours_, theirs_ in zip(output[name], expected[name], strict=True):
            assert ours_.shape == theirs_.shape
    assert output.loss is None
    assert output[0] is output[kind.logits[0]]
    as_tuple = ours(**for_theirs(kind, batch), return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], output[0])
    with pytest.raises(AttributeError, match="no 'pooled'"):
        output.pooled  # noqa: B018


@each_kind
def test_packed_is_padded(kind):
    """A PackedBatch, left padding and embeddings as input give the same results. Poisoned padding changes no bit."""
    ours = ours_of(kind)
    batch = padded_batch(kind)
    output = ours(**for_theirs(kind, batch), **logits_too(kind))
    packed = ours(**packed_batch(kind, batch), **logits_too(kind))
    torch.testing.assert_close(packed.loss, output.loss)
    real = batch["attention_mask"].bool()
    for name in kind.logits:
        expected = output[name]
        torch.testing.assert_close(packed[name], expected[real] if expected.shape[:2] == real.shape else expected)

    embeds = ours.get_input_embeddings()(batch["input_ids"])
    given = {**batch, "inputs_embeds": embeds}
    given.pop("input_ids")
    torch.testing.assert_close(ours(**for_theirs(kind, given)).loss, output.loss)

    hidden = batch["attention_mask"] == 0
    poisoned = {**batch, "input_ids": torch.where(hidden, 77, batch["input_ids"])}
    assert torch.equal(ours(**for_theirs(kind, poisoned), **logits_too(kind)).loss, output.loss)

    turned = {name: t.flip(1) if t.shape == (TEXTS, WIDTH) else t for name, t in batch.items()}
    positions = torch.arange(WIDTH).flip(0).expand(TEXTS, WIDTH)
    if kind.head in ("TokenClassification", "MaskedLM"):  # the others read the first column, or count columns
        loss = ours(**turned, position_ids=positions).loss
        torch.testing.assert_close(loss, output.loss)


def logits_too(kind: Kind) -> dict[str, bool]:
    return {"output_logits": True} if "cls.predictions.bias" in dict(ours_of(kind).named_parameters()) else {}


@each_kind
def test_a_divisor_for_the_whole_step(kind):
    """Losses and gradients of any split add up to those of one batch, however labels are distributed. In float64, so
    that any other difference than the divisor is invisible."""
    ours = ours_of(kind).double()
    batch = padded_batch(kind)
    if "next_sentence_label" in batch:
        batch["next_sentence_label"][2] = -100
    counts = {name: int(count_of(kind, name, batch[name])) for name in kind.labels}
    divisors = {"num_items_in_batch": counts[next(iter(counts))]}
    if "next_sentence_label" in counts:
        divisors["num_pairs_in_batch"] = torch.tensor(counts["next_sentence_label"])
    loss = ours(**for_theirs(kind, batch)).loss
    loss.backward()
    whole = {name: p.grad.clone() for name, p in ours.named_parameters()}
    for cut in ([4, 2], [2, 2, 2]):
        ours.zero_grad()
        losses = []
        splits = [t.split([c // CHOICES for c in cut] if len(t) < TEXTS else cut) for t in batch.values()]
        for part in zip(*splits, strict=True):
            losses.append(ours(**for_theirs(kind, dict(zip(batch, part, strict=True))), **divisors).loss)
            losses[-1].backward()
        torch.testing.assert_close(sum(losses), loss)
        for name, p in ours.named_parameters():
            torch.testing.assert_close(p.grad, whole[name], msg=lambda text, name=name: f"{name}: {text}")


def count_of(kind: Kind, name: str, labels: torch.Tensor) -> int:
    return (labels < WIDTH).sum() if kind.labels[name][0] == "place" else (labels != -100).sum()


def test_pre_training_without_the_count_of_pairs_weighs_by_words():
    """As in transformers' Trainer: the second objective's weights add up to 1 over a step."""
    kind = KINDS["pretraining"]
    ours, batch = ours_of(kind), padded_batch(kind)
    words = int((batch["labels"] != -100).sum())
    total = 0.0
    for part in (slice(0, 2), slice(2, 6)):
        given = {name: t[part] for name, t in batch.items()}
        relation = ours(**given).seq_relationship_logits
        pairs = torch.nn.functional.cross_entropy(relation, given["next_sentence_label"])
        share = (given["labels"] != -100).sum() / words
        alone = ours(**given, num_items_in_batch=words, num_pairs_in_batch=1e30).loss
        torch.testing.assert_close(ours(**given, num_items_in_batch=words).loss, alone + pairs * share)
        total += share
    torch.testing.assert_close(total, torch.tensor(1.0))


@pytest.mark.parametrize("name", ["single_label", "multi_label", "regression", "tokens", "spans", "choices",
                                  "next_sentence"])  # fmt: skip
def test_scores_are_float32_within_autocast(name):
    """In bfloat16 scores of different texts are often equal, which changes Spearman's correlation."""
    kind = KINDS[name]
    ours = ours_of(kind)
    batch = packed_batch(kind, padded_batch(kind))
    exact = ours(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ours(**batch)
    for logits in kind.logits:
        assert output[logits].dtype == torch.float32
        assert relative_rms(output[logits], exact[logits]) < 0.05
        assert not torch.equal(output[logits], output[logits].bfloat16().float())
    output.loss.backward()
    head = [p.grad for name, p in ours.named_parameters() if not name.startswith("bert.")]
    assert all(gradient.abs().max() > 0 for gradient in head)


# ---- labels that do not fit ------------------------------------------------------------------------------


def test_the_config_settles_the_kind_of_loss():
    config = BertConfig(**SIZES, num_labels=3)
    model = fastbert.BertForSequenceClassification(config)
    assert model.problem_type == "single_label_classification"
    with pytest.raises(ValueError, match=r"integers, got torch.float32.*multi_label_classification"):
        model(torch.tensor([[1, 2]]), labels=torch.rand(1, 3))
    model(torch.tensor([[1, 2]]), labels=torch.tensor([2]))
    assert config.problem_type is None
    with pytest.raises(ValueError, match="problem_type must be one of"):
        fastbert.BertForSequenceClassification(BertConfig(**SIZES, problem_type="ranking"))
    regression = fastbert.BertForSequenceClassification(BertConfig(**SIZES, num_labels=1))
    with pytest.raises(ValueError, match=r"labels are \[1, 2\], logits \[2, 1\]"):
        regression(torch.tensor([[1, 2], [3, 4]]), labels=torch.rand(1, 2))


def test_labels_of_another_shape_are_refused():
    model = fastbert.BertForTokenClassification(BertConfig(**SIZES))
    with pytest.raises(ValueError, match=r"labels must be \[1, 3\]"):
        model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match=r"labels must be \[3\]"):
        model(PackedBatch.from_lists([[1, 2], [3]]), labels=torch.tensor([[0, 1], [0, -100]]))
    choices = fastbert.BertForMultipleChoice(BertConfig(**SIZES))
    with pytest.raises(ValueError, match="needs num_choices that divides it, got None"):
        choices(PackedBatch.from_lists([[1, 2], [3]]))
    with pytest.raises(ValueError, match="two labels, start and end; the config has 5"):
        fastbert.BertForQuestionAnswering(BertConfig(**SIZES, num_labels=5))


def test_answers_outside_the_text_do_not_count():
    """Beyond the end, in padding, before the start, and -100: the loss is that of the other texts."""
    model = ours_of(KINDS["spans"])
    ids = torch.randint(1, 91, (5, 6))
    mask = (torch.arange(6) < torch.tensor([6, 4, 6, 6, 5])[:, None]).long()
    places = torch.tensor([2, 5, -100, 6, 4])
    loss = model(ids, mask, start_positions=places, end_positions=places).loss
    left = [0, 4]
    expected = model(ids[left], mask[left], start_positions=places[left], end_positions=places[left]).loss
    torch.testing.assert_close(loss, expected)
    assert model(ids, mask).start_logits[1, 4] == torch.finfo(torch.float32).min, "padding is no candidate"


def test_only_labelled_words_go_through_the_head(monkeypatch):
    model = ours_of(KINDS["words"])
    rows = []
    dense = model.cls["predictions"].transform["dense"]
    dense.register_forward_hook(lambda module, given, output: rows.append(len(output)))
    labels = torch.full((2, 5), -100)
    labels[0, 1] = labels[1, 4] = 7
    ids = torch.randint(1, 91, (2, 5))
    output = model(ids, labels=labels)
    assert rows == [2]
    assert output.logits is None
    logits = model(ids, labels=labels, output_logits=True).logits
    torch.testing.assert_close(logits, model(ids).logits[[0, 1], [1, 4]])
    assert model(ids, output_logits=False).to_tuple() == ()


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "MultipleChoice"])
def test_dropout_before_the_classifier(head):
    """At the config's rate, scaled, only in training; the same for packed and padded input."""
    kind = next(kind for kind in KINDS.values() if kind.head == head)
    config = config_of(kind)
    config.classifier_dropout = 0.5
    model = getattr(fastbert, f"BertFor{head}")(config, impl="native")
    seen = []
    model.classifier.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    batch = padded_batch(kind)
    for given in (for_theirs(kind, batch), packed_batch(kind, batch)):
        torch.manual_seed(3)
        model.train()(**given)
    model.eval()(**packed_batch(kind, batch))
    padded, packed, plain = seen
    torch.testing.assert_close(padded, packed)
    dropped = padded == 0.0
    assert 0.4 < dropped.float().mean() < 0.6
    torch.testing.assert_close(padded, torch.where(dropped, 0.0, 2 * plain))
