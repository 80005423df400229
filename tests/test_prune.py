"""Removed heads, columns and layers: the same function as with zeros, in every way in which a model runs."""

import json
import re
import shutil

import pytest
import torch

import fastbert
from command_line import run
from compression_models import config_of, task_and_windows
from fastbert import BertModel, Encoder
from fastbert.checkpoint import load_state_dict
from fastbert.compression import prune as prune_module
from fastbert.compression.folders import HISTORY
from fastbert.compression.heads import importance_of, least_heads, parse_heads, remaining_heads, shown_heads
from fastbert.compression.prune_shapes import most_important, without_columns, without_heads, without_layers
from fastbert.config import BertConfig
from fastbert.layers import quantise
from fastbert.models.heads import BertForSequenceClassification
from fastbert.packing import PackedBatch
from fastbert.testing import relative_rms

pytest_plugins = ("compression_fixtures",)

HEADS = {0: [1, 3], 1: [0, 1, 2, 3], 2: [2]}  # two heads remain in the first layer, none in the second
LENGTHS = (5, 1, 17, 9)


def batch_of(vocabulary: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(1)
    return PackedBatch.from_lists([torch.randint(5, vocabulary, (n,), generator=generator).tolist() for n in LENGTHS])


def whole(impl=None) -> BertForSequenceClassification:
    torch.manual_seed(0)
    model = BertForSequenceClassification(config_of(), impl=impl).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.1)
    return model


def zeroed(model: BertForSequenceClassification, heads) -> BertForSequenceClassification:
    """The same function with all heads, where the output of these is not read."""
    width = model.config.head_dim
    with torch.no_grad():
        for layer, numbers in heads.items():
            for head in numbers:
                weight = model.bert.encoder["layer"][layer].attention["output"]["dense"].weight
                weight[:, head * width : (head + 1) * width] = 0.0
    return model


def pruned(model: BertForSequenceClassification, heads, impl=None) -> BertForSequenceClassification:
    config, state = without_heads(model.config, model.state_dict(), heads)
    smaller = BertForSequenceClassification(config, impl=impl).eval()
    smaller.load_state_dict(state)
    return smaller


def exact(model, heads) -> BertForSequenceClassification:
    """The zeroed model in float64, by plain torch."""
    of_64 = BertForSequenceClassification(model.config, impl="reference").double().eval()
    of_64.load_state_dict(model.state_dict())
    return zeroed(of_64, heads)


# ---- numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_only", [False, True], ids=["all", "first_tokens"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_uneven_heads_are_the_zeroed_model(grad, first_only):
    """With two, no and three heads of four, the results are as near to float64 as plain torch's, by any
    implementation."""
    model = whole()
    small = pruned(model, HEADS)
    expected = exact(model, HEADS).bert(batch_of(15), first_only=first_only)
    plain = pruned(model, HEADS, "reference").bert(batch_of(15), first_only=first_only)
    with torch.set_grad_enabled(grad):
        got = small.bert(batch_of(15), first_only=first_only)
    for name in ("last_hidden_state", "pooler_output"):
        budget = 2 * relative_rms(getattr(plain, name), getattr(expected, name)) + 1e-7
        assert relative_rms(getattr(got, name), getattr(expected, name)) <= budget


def test_gradients_are_those_of_the_zeroed_model():
    """Compares the gradients that both models have, for a random upstream gradient. Removed heads have none, nor has a
    layer without heads."""
    model = whole()
    small, by_torch, of_64 = pruned(model, HEADS), pruned(model, HEADS, "reference"), exact(model, HEADS)
    batch, upstream = batch_of(15), torch.randn(sum(LENGTHS), 64)
    for each in (small, by_torch, of_64):
        (each.bert(batch).last_hidden_state * upstream.to(each.dtype)).sum().backward()
    grads = {name: p.grad for name, p in of_64.named_parameters() if p.grad is not None}
    _, expected = without_heads(of_64.config, grads, HEADS)
    of_torch = dict(by_torch.named_parameters())
    compared = 0
    for name, p in small.named_parameters():
        if not p.numel():
            assert p.grad is None
            assert not p.requires_grad
        elif name in expected:
            compared += 1
            budget = 2 * relative_rms(of_torch[name].grad, expected[name]) + 1e-6
            # a key's bias shifts all scores of a query, so its gradient is only rounding
            assert name.endswith("key.bias") or relative_rms(p.grad, expected[name]) <= budget, name
    assert compared > 40


@pytest.mark.native
@pytest.mark.parametrize("heads", [HEADS, {0: [0], 1: [0], 2: [3]}], ids=["uneven", "even"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_short_batches_in_one_call(heads, dtype):
    """The C++ call for all layers requires heads as wide as the model, and must leave other models to the layers."""
    model = whole()
    small, by_torch = pruned(model, heads).to(dtype), pruned(model, heads, "reference").to(dtype)
    expected = exact(model.to(dtype).float(), heads).bert(batch_of(15)).last_hidden_state
    with torch.inference_mode():
        plain, got = by_torch.bert(batch_of(15)).last_hidden_state, small.bert(batch_of(15)).last_hidden_state
    assert relative_rms(got, expected) <= 2 * relative_rms(plain, expected) + 1e-7


@pytest.mark.native
def test_uneven_heads_in_8_bits():
    model = whole()
    small = pruned(model, HEADS)
    expected = exact(model, HEADS).bert(batch_of(15)).last_hidden_state
    quantise(small.bert.encoder, lambda: small.bert(batch_of(15)))
    with torch.no_grad():
        assert relative_rms(small.bert(batch_of(15)).last_hidden_state, expected) < 0.05


def test_attentions_are_those_of_the_remaining_heads():
    small = pruned(whole(), HEADS)
    ids = torch.randint(5, 15, (2, 7))
    with torch.no_grad():
        attentions = small.bert(ids, output_attentions=True).attentions
    assert [a.shape[1] for a in attentions] == [2, 0, 3]


def test_accelerated_models_of_transformers_with_uneven_heads():
    """transformers 5 has no prune_heads. A model whose heads were cut by hand, as version 4 did, can be accelerated."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**{k: v for k, v in config_of().to_dict().items() if k != "model_type"})
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for number, layer in enumerate(model.encoder.layer):
            own = layer.attention.self
            kept = [head for head in range(4) if head not in {0: [1, 3], 2: [2]}.get(number, ())]
            rows = torch.cat([torch.arange(16 * head, 16 * head + 16) for head in kept])
            for part in (own.query, own.key, own.value):
                part.weight, part.bias = (torch.nn.Parameter(t[rows]) for t in (part.weight, part.bias))
            out = layer.attention.output.dense
            out.weight = torch.nn.Parameter(out.weight[:, rows])
            own.num_attention_heads, own.all_head_size = len(kept), 16 * len(kept)
    ids = torch.randint(5, 15, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    with torch.no_grad():
        expected = model(ids, mask).last_hidden_state
        got = fastbert.accelerate(model)(ids, mask).last_hidden_state
    real = mask.bool()
    assert relative_rms(got[real], expected[real].double()) < 2e-6


# ---- shapes ----------------------------------------------------------------------------------------------


@pytest.mark.once
def test_columns_without_effect_are_removed_first():
    """Columns whose part of the product is zero have the lowest importance, and removing them changes nothing."""
    model = whole("native")
    kept = [torch.arange(0, 96, 2), torch.arange(1, 96, 2), torch.arange(24, 72)]
    with torch.no_grad():
        for layer, columns in zip(model.bert.encoder["layer"], kept, strict=True):
            gone = torch.ones(96, dtype=torch.bool).index_fill(0, columns, False)
            layer.output["dense"].weight[:, gone] = 0.0
    config, state = without_columns(model.config, model.state_dict(), kept)
    smaller = BertForSequenceClassification(config, impl="native").eval()
    smaller.load_state_dict(state)
    assert config.intermediate_size == 48
    assert smaller.bert.encoder["layer"][1].output["dense"].weight.shape == (64, 48)
    with torch.no_grad():
        assert relative_rms(smaller(batch_of(15)).logits, model(batch_of(15)).logits.double()) < 1e-5
    importance = importance_of(model, *task_and_windows(), [range(24)], torch.device("cpu"))[1]
    found = most_important(importance, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


@pytest.mark.once
def test_columns_are_a_multiple_of_16():
    """The multiple nearest to the share is kept, and of each layer the largest columns."""
    rising = torch.arange(96.0)
    for share, kept in ((0.3, 64), (0.5, 48), (0.9, 16)):
        found = most_important([rising, rising.flip(0)], share)
        assert [columns.tolist() for columns in found] == [list(range(96 - kept, 96)), list(range(kept))]


@pytest.mark.once
def test_remaining_layers_are_renumbered():
    model = pruned(whole(), HEADS)
    config, state = without_layers(model.config, model.state_dict(), [0])
    assert (config.num_hidden_layers, config.pruned_heads) == (2, {0: [0, 1, 2, 3], 1: [2]})
    smaller = BertForSequenceClassification(config).eval()
    smaller.load_state_dict(state)
    del model.bert.encoder["layer"][0]
    with torch.no_grad():
        assert torch.allclose(smaller(batch_of(15)).logits, model(batch_of(15)).logits, atol=1e-6)


@pytest.mark.once
def test_heads_removed_twice_keep_their_original_numbers():
    model = whole()
    once = without_heads(model.config, model.state_dict(), {0: [1], 2: [0, 2]})
    twice = without_heads(*once, {0: [3], 1: [0]})
    together = without_heads(model.config, model.state_dict(), {0: [1, 3], 1: [0], 2: [0, 2]})
    assert twice[0] == together[0]
    assert remaining_heads(twice[0]) == {0: [0, 2], 1: [1, 2, 3], 2: [1, 3]}
    assert all(torch.equal(twice[1][name], t) for name, t in together[1].items())


@pytest.mark.once
def test_heads_by_name():
    assert parse_heads("0:1,3;2:5") == {0: [1, 3], 2: [5]} == parse_heads(" 2:5; 0 : 3, 1;0:1")
    assert shown_heads({2: [5], 0: [1, 3]}) == "0:1,3;2:5"
    for wrong in ("0:", "0:1;", "1", "0:1-3", "a:1", ""):
        with pytest.raises(ValueError, match="expected heads as LAYER:HEAD"):
            parse_heads(wrong)


# ---- importance ------------------------------------------------------------------------------------------


@pytest.mark.once
def test_importance_is_the_change_of_the_loss():
    """Compared with differences of the loss in float64, for one head or column and one example at a time."""
    model = exact(whole(), {})
    task, windows = task_and_windows(6)
    of_heads, of_columns = importance_of(model, task, windows, [[0, 1, 2], [3, 4, 5]], torch.device("cpu"))

    def moved(linear, columns) -> float:
        total, weight, step = 0.0, linear.weight.detach().clone(), 1e-4
        for window in windows:
            losses = []
            for factor in (1 + step, 1 - step):
                with torch.no_grad():
                    linear.weight[:, columns] = weight[:, columns] * factor
                    batch = PackedBatch.from_lists([window.input_ids])
                    losses.append(model(batch, labels=torch.tensor([window.target])).loss.item())
                    linear.weight.copy_(weight)
            total += abs(losses[0] - losses[1]) / (2 * step)
        return total / len(windows)

    alone = importance_of(model, task, windows, [[0], [1, 2, 3, 4, 5]], torch.device("cpu"))[0]
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(alone, of_heads, strict=True)), "batches do not matter"
    for number, layer in enumerate(model.bert.encoder["layer"]):
        by_head = torch.tensor(
            [moved(layer.attention["output"]["dense"], slice(16 * h, 16 * h + 16)) for h in range(4)]
        )
        assert torch.allclose(of_heads[number], by_head / by_head.norm(), rtol=1e-3)
        some = torch.tensor([moved(layer.output["dense"], slice(c, c + 1)) for c in (0, 50, 95)])
        ratios = of_columns[number][[0, 50, 95]] / some
        assert torch.allclose(ratios, ratios.mean().expand(3), rtol=1e-3)


@pytest.mark.once
def test_heads_that_nothing_reads_are_the_least_important():
    model = zeroed(whole("native"), HEADS)
    of_heads, _ = importance_of(model, *task_and_windows(), [range(24)], torch.device("cpu"))
    assert least_heads(of_heads, 7 / 12, model.config) == HEADS


# ---- folders ---------------------------------------------------------------------------------------------


@pytest.mark.once
def test_a_pruned_folder_is_read_by_all_programs(teacher, data, tmp_path, capsys):
    """`predict`, `Encoder` and a server read the folder, and give the answers of the model with zeros."""
    out = tmp_path / "out"
    assert run("prune", teacher, "-o", out, "--heads", "0:1,3;1:0,1,2,3;2:2") == 0
    said = capsys.readouterr().out
    assert "heads left in the layers: 2, 0, 3" in said
    assert "transformers cannot read this folder" in said
    assert sorted(p.name for p in out.iterdir()) == sorted([*(p.name for p in teacher.iterdir()), HISTORY])
    record = json.loads((out / HISTORY).read_text())["steps"][0]
    assert record["heads"] == "0:1,3;1:0,1,2,3;2:2"
    assert record["after"]["parameters"] == sum(t.numel() for t in load_state_dict(out).values())
    zero = zeroed(BertForSequenceClassification.from_pretrained(teacher), HEADS)
    zero.save_pretrained(tmp_path / "zero")
    for name in ("fastbert_task.json", "tokenizer.json", "tokenizer_config.json"):
        if (teacher / name).exists():
            (tmp_path / "zero" / name).write_bytes((teacher / name).read_bytes())
    texts = ["ab cd", "e", "fa ga ha"]
    options = {"dtype": "float32", "device": "cpu", "impl": "native"}
    expected = fastbert.pipeline(tmp_path / "zero", **options)(texts, all_scores=True)
    for got, wanted in zip(fastbert.pipeline(out, **options)(texts, all_scores=True), expected, strict=True):
        assert got["label"] == wanted["label"]
        assert abs(got["score"] - wanted["score"]) < 1e-5
    vectors = [Encoder.from_pretrained(folder, **options).encode(texts) for folder in (out, tmp_path / "zero")]
    assert torch.allclose(*vectors, atol=1e-5)

    from fastbert.service.models import load
    from fastbert.service.settings import Settings

    served = load("small", out, Settings(device="cpu", dtype="float32", impl="native"))
    assert "labels" in served.abilities


@pytest.mark.once
def test_layers_and_columns_for_transformers(teacher, data, tmp_path, capsys):
    """If no head was removed, transformers reads the folder too, with the same logits."""
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    assert run("prune", teacher, "-o", out, "--layers", "1", "--ffn", "0.5", "--data", data, "--impl", "native") == 0
    assert "transformers" not in capsys.readouterr().out
    ids = torch.randint(5, 15, (2, 7))
    theirs = transformers.BertForSequenceClassification.from_pretrained(out).eval()
    ours = BertForSequenceClassification.from_pretrained(out, impl="native")
    assert theirs.config.intermediate_size == 48
    assert theirs.config.num_hidden_layers == 2
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)


@pytest.mark.once
def test_half_of_the_heads_and_then_training(teacher, data, tmp_path, capsys):
    """Heads are removed by importance; then `fastbert finetune` trains the rest, with a layer that has no heads."""
    out, again = tmp_path / "out", tmp_path / "tuned"
    assert run("prune", teacher, "-o", out, "--heads", "0.5", "--data", data, "--impl", "native") == 0
    config = BertConfig.from_pretrained(out)
    assert sum(map(len, config.pruned_heads.values())) == 6
    assert run("prune", out, "-o", tmp_path / "less", "--heads", shown_heads({0: remaining_heads(config)[0]})) == 0
    steps = json.loads((tmp_path / "less" / HISTORY).read_text())["steps"]
    assert [step["model"] for step in steps] == [str(teacher), str(out)]
    assert run(
        "finetune", "--task", "sentence", "--model", tmp_path / "less", "--train", data, "--eval", data, "--out", again,
        "--columns", "text,label", "--epochs", 1, "--impl", "native", "-q",
    ) == 0  # fmt: skip
    before, after = load_state_dict(tmp_path / "less"), load_state_dict(again)
    assert BertConfig.from_pretrained(again).heads_of(0) == 0
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    # training continued from the teacher's classifier
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])
    steps = json.loads((again / HISTORY).read_text())["steps"]
    assert [step["command"] for step in steps] == ["prune", "prune", "finetune"]


@pytest.mark.once
def test_a_folder_of_sentence_transformers(teacher, tmp_path):
    """Its other modules are kept, and the model may be in a folder of its own."""
    whole = tmp_path / "texts"
    (whole / "1_Pooling").mkdir(parents=True)
    (whole / "onnx").mkdir()
    BertModel.from_pretrained(teacher).save_pretrained(whole / "0_Transformer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (teacher / name).exists():
            (whole / "0_Transformer" / name).write_bytes((teacher / name).read_bytes())
    kinds = (("0_Transformer", "Transformer"), ("1_Pooling", "Pooling"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (whole / "modules.json").write_text(json.dumps(modules))
    pooling = {"word_embedding_dimension": 64, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (whole / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    assert run("prune", whole, "-o", tmp_path / "out", "--layers", "2", "--heads", "0:0", "-q") == 0
    encoder = Encoder.from_pretrained(tmp_path / "out", device="cpu", dtype="float32")
    assert encoder.pooling == "cls"
    assert len(encoder.model.encoder["layer"]) == 2
    assert encoder.config.pruned_heads == {0: [0]}
    assert not (tmp_path / "out" / "onnx").exists()


@pytest.mark.once
def test_cuts_of_every_kind_at_once(teacher, tmp_path):
    """Heads and layers have the model's numbers; the share of zeros is that of the remaining weights."""
    out = tmp_path / "out"
    cuts = ["--layers", "0", "--heads", "1:0;2:1,3", "--magnitude", "0.5", "--scope", "layer"]
    assert run("prune", teacher, "-o", out, *cuts, "-q") == 0
    assert BertConfig.from_pretrained(out).pruned_heads == {0: [0], 1: [1, 3]}
    before, after = load_state_dict(teacher), load_state_dict(out)
    for name, rows in (("query", range(16, 64)), ("value", range(16, 64))):
        whole = before[f"bert.encoder.layer.1.attention.self.{name}.weight"][list(rows)]
        found = after[f"bert.encoder.layer.0.attention.self.{name}.weight"]
        assert torch.equal(found, whole * (found != 0))
        assert (found == 0).sum() == found.numel() // 2
    assert json.loads((out / HISTORY).read_text())["steps"][0]["share of zeros"] == 0.5


@pytest.mark.once
def test_importance_is_measured_on_drawn_examples(teacher, data, tmp_path, monkeypatch):
    """--examples gives their number; --seed draws them; they keep their order."""
    seen = []

    def noted(model, task, windows, batches, device):
        seen.append([window.example for window in windows])
        return importance_of(model, task, windows, batches, device)

    monkeypatch.setattr(prune_module, "importance_of", noted)
    for number, seed in enumerate((0, 0, 1)):
        options = ["--heads", "0.5", "--data", data, "--examples", 7, "--seed", seed, "--impl", "native", "-q"]
        assert run("prune", teacher, "-o", tmp_path / str(number), *options) == 0
    assert all(len(set(numbers)) == 7 and numbers == sorted(numbers) for numbers in seen)
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.once
def test_the_report_of_the_training_stays_with_its_model(teacher, tmp_path):
    """It has the scores of the model before pruning."""
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    (copy / "report.json").write_text("{}")
    assert run("prune", copy, "-o", tmp_path / "out", "--layers", "0", "-q") == 0
    assert not (tmp_path / "out" / "report.json").exists()


WRONG = {
    "all_heads": (["--heads", "0:0,1,2,3;1:0,1,2,3;2:0,1,2,3"], "all heads of all layers would be gone"),
    "no_such_head": (["--heads", "0:4"], "there is no head 4 in layer 0: it has heads 0 to 3"),
    "no_such_layer_of_heads": (["--heads", "3:0"], "there is no layer 3: the model has layers 0 to 2"),
    "no_such_layer": (["--layers", "0,3"], "there is no layer 3: the model has layers 0 to 2"),
    "all_layers": (["--layers", "0,1,2"], "all 3 layers would be gone"),
    "layers_without_heads": (["--heads", "0:0,1,2,3", "--layers", "1,2"], "none of the remaining layers has head"),
    "no_data": (["--heads", "0.5"], "needs --data with examples"),
    "too_few_heads": (["--heads", "0.01", "--data", "DATA"], "a share of 0.01 of 12 heads rounds to none"),
    "too_many_columns": (["--ffn", "0.99", "--data", "DATA"], "a share of 0.99 of 96 feed-forward columns leaves 0"),
    "another_task": (["--heads", "0.5", "--data", "OTHER"], "column"),
    "unknown_label": (["--heads", "0.5", "--data", "LABELS"], "never"),
    "nothing": ([], "nothing to prune"),
    "training_without_zeros": (["--layers", "0", "--train", "DATA"], "--train sets weights to zero step by step"),
    "rate_without_training": (["--layers", "0", "--lr", "1"], "--lr is an option of training, and needs --train"),
    "resume_without_training": (["--layers", "0", "--resume"], "--resume is an option of training, and needs --train"),
    "share": (["--magnitude", "1"], "a share between 0 and 1, got '1'"),
    "heads_without_a_layer": (["--heads", "1,3"], r"a share between 0 and 1, got '1,3'; heads by name are LAYER:HEAD"),
    "scope_of_nothing": (["--layers", "0", "--scope", "global"], "--scope is an option of --magnitude"),
    "data_for_nothing": (["--layers", "0", "--data", "DATA"], "--data is for shares of heads and columns"),
}


@pytest.mark.once
@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_invalid_arguments_are_refused(teacher, data, tmp_path, capsys, options, message):
    """The error is one line, and nothing is written."""
    other, labels = tmp_path / "other.tsv", tmp_path / "labels.tsv"
    other.write_text("one\ttwo\na b\tearly\n")
    labels.write_text("text\tlabel\na b\tsometimes\n")
    files = {"DATA": data, "OTHER": other, "LABELS": labels}
    out = tmp_path / "out"
    words = (files.get(word, word) for word in options)
    assert run("prune", teacher, "-o", out, "--impl", "native", *words) in (1, 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said), said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labels.tsv", "other.tsv"]


@pytest.mark.once
def test_folders_without_a_model_and_existing_outputs_are_refused(teacher, tmp_path, capsys):
    half, taken = tmp_path / "half", tmp_path / "taken"
    half.mkdir(), taken.mkdir()
    (half / "config.json").write_bytes((teacher / "config.json").read_bytes())
    (taken / "mine.txt").write_text("mine")
    assert run("prune", half, "-o", tmp_path / "out", "--layers", "0") == 1
    assert f"{half} has no weights" in capsys.readouterr().err
    (half / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes()[:5000])
    assert run("prune", half, "-o", tmp_path / "out", "--layers", "0") == 1
    assert "is truncated" in capsys.readouterr().err
    assert run("prune", teacher, "-o", taken, "--layers", "0") == 1
    assert f"{taken} exists, and is no empty folder" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half", "taken"]
    assert (taken / "mine.txt").exists()
    BertModel.from_pretrained(teacher).save_pretrained(taken / "plain")
    assert run("prune", taken / "plain", "-o", tmp_path / "out", "--heads", "0.5", "--data", "x.tsv") == 1
    assert "fastbert finetune comes first" in capsys.readouterr().err
