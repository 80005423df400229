"""Distilling in the training loop, students and their first weights, and pairing layers of teacher and student."""

import copy
import json

import pytest
import torch

from distill_models import ALL, CPU, distilled_of, divisor_of, doubled, losses_of, model_of, recipe_of, run_of
from fastbert import BertConfig, Tokenizer
from fastbert.compression import bottleneck, losses
from fastbert.compression.distilled import projections_of
from fastbert.compression.students import make_student
from fastbert.models.heads import BertForMaskedLM
from fastbert.storage import CheckpointError
from fastbert.text.files import InputError
from fastbert.training.predicting import pack
from training_models import KINDS, PIECES, task_of
from two_processes import run_in_two

pytestmark = pytest.mark.native


def gradients(run) -> dict[str, torch.Tensor]:
    run.shared.train()
    run.loss_of_step = run._gradients(run.plan.steps(1)[0], 1)
    return {name: p.grad.double() for name, p in run.model.named_parameters()}


# ---- the loop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sentence", "several", "token", "qa"])
def test_gradients_do_not_depend_on_how_a_step_is_cut(kind, tmp_path):
    """With dropout and a projection. Each loss is divided once, by the count of the whole step."""
    whole = run_of(tmp_path, kind, *ALL, width=16)
    exact = run_of(tmp_path, kind, *ALL, width=16)
    exact.model, exact.shared = (doubled(exact.model),) * 2
    truth = gradients(exact)
    allowed = gradients(whole)
    parts = run_of(tmp_path, kind, *ALL, width=16, batch_tokens=20)
    assert len(parts.share(parts.plan.steps(1)[0], 1)[0]) > 1
    found = gradients(parts)
    scale = max(g.norm() for g in truth.values())
    for name, g in truth.items():
        assert (found[name] - g).norm() <= 2 * (allowed[name] - g).norm() + 1e-6 * scale, name
    torch.testing.assert_close(parts.loss_of_step, whole.loss_of_step, rtol=1e-5, atol=1e-6)
    assert len(parts.loss_of_step) == 1 + len(ALL)


@pytest.mark.once
def test_two_processes_train_as_one(tmp_path):
    """Under DDP and FSDP2, with dropout and a projection: the tokens of a step are shared unevenly, and every loss
    equals that of one process except for rounding."""
    both = tmp_path / "ddp", tmp_path / "fsdp"
    run_in_two("distill_models.py", *both)
    one = run_of(tmp_path / "one", "token", *ALL, width=16)
    one.train()
    for two in both:
        rows, expected = (
            [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            for out in (two, tmp_path / "one")
        )
        assert [row["step"] for row in rows] == [row["step"] for row in expected]
        for name in ("loss", *one.PARTS):
            assert [row[name] for row in rows] == pytest.approx([row[name] for row in expected], rel=1e-4), name
        again = run_of(two, "token", *ALL, width=16)
        assert again.resume() == one.steps
        for name, p in one.model.named_parameters():
            torch.testing.assert_close(again.model.get_parameter(name), p, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.once
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_divided_by_its_own_items(kind, tmp_path):
    """Each loss by the number of its items in the step: labels, rows of logits, tokens and texts."""
    run = run_of(tmp_path, kind, "labels", "logits", "hidden", "first")
    for step in run.plan.steps(0):
        assert run.share(step, 0)[1] == divisor_of(run.model, run.task, [run.windows[row] for row in step])


def test_texts_without_labels_teach_as_much(tmp_path):
    """Only the teacher is used: the targets of the windows are not read."""
    run, blind = (run_of(tmp_path, "token", "logits", "hidden") for _ in range(2))
    blind.windows = [type(w)(w.input_ids, w.token_type_ids, w.example, None, w.words) for w in blind.windows]
    torch.testing.assert_close(gradients(blind), gradients(run))


def test_a_student_comes_nearer_to_its_teacher(tmp_path):
    """The losses of the last steps are smaller than those of the first, and the teacher does not change."""
    names = [name for name in ALL if name != "labels"]  # labels pull towards other answers
    run = run_of(tmp_path, "sentence", *names, width=16, dropout=0.0, epochs=30, lr=5e-3)
    run.SAVES_EPOCHS = False
    before = {name: t.clone() for name, t in run.model.teacher.state_dict().items()}
    assert not any(name.startswith("_beside") for name in run.model.state_dict())
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in run.PARTS:
        first, last = (sum(row[name] for row in some) for some in (rows[:6], rows[-6:]))
        assert last < 0.9 * first, name
    for name, t in run.model.teacher.state_dict().items():
        assert torch.equal(t, before[name])
    assert not run.model.teacher.training
    assert {name.partition(".")[0] for name in run.model.state_dict()} == {"student", "projections"}


@pytest.mark.parametrize("names", [("logits", "hidden"), ("attention",)], ids=["answers", "without-a-head"])
def test_a_resumed_run_ends_with_the_same_bits(names, tmp_path):
    """With its projection. If no loss trains the head, the head does not change."""
    whole = run_of(tmp_path / "whole", "sentence", *names, width=16)
    whole.train()
    first = run_of(tmp_path / "parts", "sentence", *names, width=16, save_every=1)
    half = whole.progress.step // 2

    class Stop(Exception):
        pass

    def stop(record):
        if record["step"] == half + 1:
            raise Stop

    first.report = stop
    with pytest.raises(Stop):
        first.train()
    second = run_of(tmp_path / "parts", "sentence", *names, width=16)
    assert second.resume() == half
    second.train()
    for name, p in whole.model.named_parameters():
        assert torch.equal(p, second.model.get_parameter(name)), name


def test_hooks_are_removed(tmp_path):
    """The hooks return what the layer's own linear layers compute."""
    task, _, windows = task_of("sentence", 8)
    model, batch = model_of(task, 2).eval(), pack(windows, range(8), CPU)
    with projections_of(model, [1]) as found:
        states = model(batch, output_hidden_states=True).hidden_states
    attention = model.bert.encoder["layer"][1].attention["self"]
    expected = torch.cat([linear(states[1]) for linear in attention.values()], -1)
    torch.testing.assert_close(found[1], expected, atol=1e-5, rtol=1e-5)
    assert not attention._forward_hooks
    with pytest.raises(RuntimeError, match="on purpose"), projections_of(model, [0, 1]):
        raise RuntimeError("on purpose")
    assert not attention._forward_hooks


def test_gradients_are_the_same_without_stored_activations(tmp_path):
    run, other = (run_of(tmp_path, "sentence", *ALL, width=16) for _ in range(2))
    other.model.student.gradient_checkpointing_enable()
    for (name, g), found in zip(gradients(run).items(), gradients(other).values(), strict=True):
        torch.testing.assert_close(found, g, msg=name)


def test_losses_are_not_computed_in_half_precision(monkeypatch):
    """Within autocast the forward passes are in bfloat16, but the losses are not."""
    trained, task, windows = distilled_of("sentence", "logits", "attention", "minilm2", pairs=((0, 0), (2, 2)))
    asked, of_pairs = [], losses.pairwise

    def pairwise(a, *others):
        asked.append((a.dtype, torch.is_autocast_enabled("cpu")))
        return of_pairs(a, *others)

    monkeypatch.setattr(losses, "pairwise", pairwise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses_of(trained, task, windows, divisor_of(trained, task, windows))
    assert asked == [(torch.bfloat16, False)] * 5
    assert all(loss.dtype == torch.float32 for loss in found)


# ---- students ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def school():
    """(a teacher of four layers, its tokenizer, some texts)."""
    task, _, windows = task_of("sentence", 12)
    return model_of(task, 4, seed=5).eval(), task.tokenizer, pack(windows, range(12), CPU)


def student_of(school, given, init=None, teacher=None):
    own, tokenizer, texts = school
    return make_student(str(given), init, teacher or own, tokenizer, texts, 0, "native")


@pytest.mark.once
@pytest.mark.parametrize(("init", "layers"), [(None, [1, 3]), ("last", [2, 3]), ("0,2", [0, 2]), ("first", [0, 1])])
def test_layers_of_the_teacher(school, init, layers):
    """Embeddings, pooler and classifier are copied too, so a student with all layers answers like the teacher."""
    teacher = school[0]
    student = student_of(school, 2, init)
    for new, old in enumerate(layers):
        one, other = student.bert.encoder["layer"][new], teacher.bert.encoder["layer"][old]
        for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q), name
            assert p.data_ptr() != q.data_ptr(), "a copy"
    for part in ("bert.embeddings", "bert.pooler", "classifier"):
        for p, q in zip(
            student.get_submodule(part).parameters(), teacher.get_submodule(part).parameters(), strict=True
        ):
            assert torch.equal(p, q)
    whole = student_of(school, 4, init="skip")
    torch.testing.assert_close(whole(school[2]).logits, teacher(school[2]).logits)
    assert student.config.id2label == teacher.config.id2label
    assert student.config.num_hidden_layers == 2


@pytest.mark.once
def test_a_teacher_with_pruned_heads(school):
    task = task_of("sentence")[0]
    torch.manual_seed(0)
    config = BertConfig.from_dict(school[0].config.to_dict(), pruned_heads={1: [0], 3: [1]})
    teacher = type(school[0])(config, "native").eval()
    student = student_of(school, 2, "0,3", teacher)
    assert student.config.pruned_heads == {1: [1]}
    assert student_of(school, 4, "skip", teacher)(school[2]).logits.equal(teacher(school[2]).logits)
    assert task.labels == [student.config.id2label[i] for i in range(2)]


def write_config(path, **sizes):
    path.write_text(json.dumps({"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1,
                                "intermediate_size": 24, "max_position_embeddings": 32, **sizes}))  # fmt: skip
    return path


def test_a_bottleneck_brings_a_student_near_its_teacher(school, tmp_path):
    """Its hidden states are much nearer to the teacher's, projected on the same basis, than those of random weights;
    also on texts that were not used to find the basis."""
    teacher, _, texts = school
    file = write_config(tmp_path / "narrow.json")
    others = pack(task_of("sentence", 40)[2][20:], range(20), CPU)
    narrow, new = student_of(school, file), student_of(school, file, "new")
    layers, shown = [1, 3], bottleneck._outputs_of_norms(teacher, texts)
    names = [
        f"bert.encoder.layer.{layer}.{place}.LayerNorm" for layer in layers for place in ("attention.output", "output")
    ]
    basis = bottleneck._basis([shown[name] for name in ["bert.embeddings.LayerNorm", *names]], 16)

    def unlike(student):
        given, own = (model(others, output_hidden_states=True).hidden_states for model in (teacher, student))
        pairs = [(own[s + 1], given[t + 1] @ basis) for s, t in enumerate(layers)]
        return float(sum((x - y).square().sum() for x, y in pairs) / sum(y.square().sum() for _, y in pairs))

    with torch.no_grad():
        assert unlike(narrow) < 0.6 * unlike(new)
    assert narrow(others).logits.isfinite().all()


@pytest.mark.once
def test_a_bottleneck_keeps_heads_that_are_read():
    """A head with large values does not count if the next linear layer does not read it."""
    value, out = torch.ones(4 * 3, 8), torch.ones(8, 4 * 3)
    value[0:3] *= 9.0
    out[:, 0:3] = 0.0
    value[6:9] *= 2.0
    layer = "bert.encoder.layer.0."
    state = {f"{layer}attention.self.value.weight": value, f"{layer}attention.output.dense.weight": out}
    assert bottleneck._largest_heads(state, layer, 3, 3).tolist() == [6, 7, 8]
    out[:, 9:12] *= 0.5
    assert bottleneck._largest_heads(state, layer, 6, 3).tolist() == [3, 4, 5, 6, 7, 8]


@pytest.mark.once
def test_a_student_wider_than_its_teacher_begins_with_random_weights(school, tmp_path):
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 64}
    student = student_of(school, write_config(tmp_path / "wide.json", **sizes))
    assert student.config.hidden_size == 48
    assert student(school[2]).logits.isfinite().all()


def with_uneven_norms(model):
    """A copy whose LayerNorms have weights and biases as after training."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "LayerNorm" in name:
                p.add_(0.3 * torch.randn_like(p))
    return model


def test_a_bottleneck_of_full_size_equals_the_teacher(school, tmp_path, monkeypatch):
    """With all directions, heads and columns, in a basis in which LayerNorm keeps its form."""
    monkeypatch.setattr(bottleneck, "_basis", lambda states, width: torch.eye(width))
    teacher, _, texts = school
    teacher = with_uneven_norms(teacher)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 40, "num_hidden_layers": 4}
    student = student_of(school, write_config(tmp_path / "same.json", **sizes), "bottleneck", teacher)
    torch.testing.assert_close(student(texts).logits, teacher(texts).logits, atol=2e-4, rtol=2e-4)
    for kind in ("token", "qa"):
        task, _, windows = task_of(kind, 6)
        wide, batch = with_uneven_norms(model_of(task, 2, seed=4).eval()), pack(windows, range(len(windows)), CPU)
        given = write_config(tmp_path / "same.json", **sizes | {"num_hidden_layers": 2})
        own, other = (
            model(batch)
            for model in (make_student(str(given), "bottleneck", wide, task.tokenizer, batch, 0, "native"), wide)
        )
        for x, y in zip(own.values(), other.values(), strict=True):
            torch.testing.assert_close(x, y, atol=2e-4, rtol=2e-4)


def test_a_bottleneck_of_masked_words(school, tmp_path):
    torch.manual_seed(0)
    config = BertConfig.from_dict(school[0].config.to_dict(), initializer_range=0.3)
    teacher = BertForMaskedLM(config, "native").eval()
    student = student_of(school, write_config(tmp_path / "narrow.json"), None, teacher)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert student(school[2]).logits.shape == (school[2].total_tokens, len(PIECES))


@pytest.mark.once
def test_a_student_has_as_many_token_types_as_its_teacher(school, tmp_path):
    """A file of sizes without their number means 2, but the teacher may have one."""
    teacher = type(school[0])(BertConfig.from_dict(school[0].config.to_dict(), type_vocab_size=1), "native").eval()
    for init in (None, "new"):
        student = student_of(school, write_config(tmp_path / "narrow.json"), init, teacher)
        assert student.bert.embeddings.token_type_embeddings.weight.shape == (1, 16)


@pytest.mark.once
@pytest.mark.parametrize(
    ("sizes", "init", "says"),
    [
        ({"num_attention_heads": 2}, None, "keeps whole heads: the student's are 8 wide, the teacher's 16"),
        ({"intermediate_size": 41}, None, "its intermediate_size is 41, the teacher's 40"),
        ({}, "last", "the student's hidden_size is 16, the teacher's 32: --init bottleneck and new"),
        ({"vocab_size": 99}, None, r"narrow.json has a vocabulary of 99, the teacher one of 25"),
        ({"num_hidden_layers": 5}, None, "the student has 5, the teacher 4"),
    ],
)
def test_sizes_that_do_not_fit(school, tmp_path, sizes, init, says):
    with pytest.raises(InputError, match=says):
        student_of(school, write_config(tmp_path / "narrow.json", **sizes), init)


def save(model, folder, tokenizer):
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.mark.once
def test_an_existing_model_as_student(school, tmp_path):
    """It keeps its own head if that has the teacher's labels, and gets a new one if it has none. Another vocabulary or
    other labels are refused."""
    teacher, tokenizer, _ = school
    folder = save(model_of(task_of("sentence")[0], 1, seed=9), tmp_path / "own", tokenizer)
    student = student_of(school, folder)
    assert student.config.num_hidden_layers == 1
    assert not student.initialised
    plain = save(student.bert, tmp_path / "plain", tokenizer)
    begun = student_of(school, plain)
    assert begun.config.id2label == teacher.config.id2label
    assert torch.equal(begun.classifier.bias, teacher.classifier.bias)
    with pytest.raises(InputError, match="--init is for a student that is made"):
        student_of(school, folder, "skip")
    other = save(
        model_of(task_of("sentence")[0], 1), tmp_path / "words", Tokenizer.from_words(PIECES[::-1], lowercase=True)
    )
    with pytest.raises(InputError, match=r"words has another vocabulary than the teacher .the word '"):
        student_of(school, other)
    other = save(model_of(task_of("sentence")[0], 1), tmp_path / "case", Tokenizer.from_words(PIECES, lowercase=False))
    with pytest.raises(InputError, match="prepares text in another way"):
        student_of(school, other)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "up", "1": "down"}, "label2id": {"up": 0, "down": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"has the labels up, down, the teacher early, Late"):
        student_of(school, folder)
    (plain / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="plain"):
        student_of(school, plain)


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "student", "says"),
    [
        ("attention", {"num_attention_heads": 4}, "the student's layer 0 has 4, the teacher's layer 1 2"),
        ("minilm", {"num_attention_heads": 1}, "the student's layer 2 has 1, the teacher's layer 3 2"),
        ("minilm2", {"hidden_size": 30}, "into 4 heads, and those of the student's layer 2 are 30 wide"),
    ],
)
def test_heads_that_cannot_be_compared(school, name, student, says):
    own = BertConfig.from_dict(school[0].config.to_dict(), num_hidden_layers=3, **student)
    with pytest.raises(InputError, match=says):
        recipe_of(name).expect_fit(own, school[0].config)
