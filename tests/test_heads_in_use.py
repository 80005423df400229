"""Heads in other libraries' loops: transformers' Trainer, PEFT, and torch's DDP and FSDP2."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastbert
from fastbert import BertConfig

transformers = pytest.importorskip("transformers", reason="runs transformers' Trainer")

SIZES = {
    "vocab_size": 91, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}  # fmt: skip
ROWS, WIDTH = 8, 9


def ours_of(head: str) -> torch.nn.Module:
    config = BertConfig(**SIZES, num_labels=2 if head == "QuestionAnswering" else 3)
    return getattr(fastbert, f"BertFor{head}")(config, impl="native")


def rows_of(head: str) -> list[dict]:
    """Examples with different numbers of labels in the parts of a step."""
    real = (torch.arange(WIDTH) < torch.tensor([9, 3, 5, 9, 2, 7, 8, 4])[:, None]).long()
    given = {"input_ids": torch.randint(1, 91, (ROWS, WIDTH)), "attention_mask": real}
    if head == "SequenceClassification":
        given["labels"] = torch.randint(0, 3, (ROWS,))
    elif head == "QuestionAnswering":
        given |= {"start_positions": torch.zeros(ROWS, dtype=torch.int64), "end_positions": real.sum(1) - 1}
    else:
        given["labels"] = torch.randint(0, 3, (ROWS, WIDTH)).masked_fill(real == 0, -100)
        given["labels"][:3, 1:] = -100
    return [{name: t[row] for name, t in given.items()} for row in range(ROWS)]


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def trainer_of(model, rows, folder, *, batch=ROWS, parts=1, **options):
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=parts, max_steps=1, optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to="none",
        disable_tqdm=True, logging_strategy="no", **{"save_strategy": "no"} | options,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate)


# ---- transformers' Trainer -------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "MaskedLM"])
def test_trainer_takes_the_step_of_one_plain_batch(head, tmp_path):
    """In one batch and in four. transformers' own BERT makes a step four times as long with four, which also depends on
    how the labels are distributed."""
    torch.manual_seed(1)
    model = ours_of(head)
    rows, before = rows_of(head), copy.deepcopy(model)
    before(**collate(rows)).loss.backward()
    for batch, parts in ((8, 1), (2, 4)):
        trained = copy.deepcopy(before)
        trained.zero_grad()
        result = trainer_of(trained, rows, tmp_path, batch=batch, parts=parts).train()
        assert result.training_loss == pytest.approx(before(**collate(rows)).loss.item(), rel=1e-5)
        for (name, p), q in zip(trained.named_parameters(), before.parameters(), strict=True):
            # with SGD at 0.1, a tenth of a gradient's error shows in the weights
            torch.testing.assert_close(
                p, q - 0.1 * q.grad, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.once
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM"])
def test_trainer_evaluates_predicts_saves_and_resumes(head, tmp_path):
    model = ours_of(head)
    rows = rows_of(head)
    trainer = trainer_of(model, rows, tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    with torch.no_grad():
        expected = model.eval()(**collate(rows))
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    if head != "MaskedLM":  # with labels this head has no logits
        labels = ("labels", "start_positions", "end_positions")
        unlabelled = [{name: t for name, t in row.items() if name not in labels} for row in rows]
        for given in (rows, unlabelled):
            found = trainer.predict(given).predictions
            found = found if isinstance(found, tuple) else (found,)
            for ours, theirs in zip(found, [t for name, t in expected.items() if name != "loss"], strict=True):
                torch.testing.assert_close(torch.from_numpy(ours), theirs)

    again = ours_of(head)
    trainer = trainer_of(again, rows, tmp_path, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=True)  # its single step is already done
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


# ---- PEFT ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets", [("query", "value"), ("query", "key", "value", "dense")], ids=["query_value", "all"]
)
def test_lora_gives_what_it_gives_in_transformers(targets, tmp_path):
    """Outputs, gradients of only the adapters and the classifier, and the adapter's file. With and without gradients,
    the layers' weights are not read past the adapters."""
    peft = pytest.importorskip("peft", reason="makes the adapters")
    plain = ours_of("SequenceClassification")
    theirs = transformers.BertForSequenceClassification(transformers.BertConfig(**plain.config.to_dict()))
    theirs.load_state_dict(plain.state_dict())
    config = peft.LoraConfig(r=4, target_modules=[*targets], task_type="SEQ_CLS", init_lora_weights=False)
    models = [peft.get_peft_model(model, copy.deepcopy(config)) for model in (copy.deepcopy(plain), theirs)]
    models[0].load_state_dict(models[1].state_dict())  # the same adapters for both
    ours, theirs = models
    batch = collate(rows_of("SequenceClassification"))
    outputs = [model.train()(**batch) for model in models]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0].logits, plain(**batch).logits, atol=1e-2), "the adapters make no difference"
    for output in outputs:
        output.loss.backward()
    trained = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys()
    assert any("lora_A" in name for name in trained)
    assert any("classifier" in name for name in trained)
    for name, grad in trained.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")

    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(**batch).logits, outputs[1].logits, rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    torch.testing.assert_close(again(**batch).logits, outputs[1].logits, rtol=1e-4, atol=1e-5)
    merged = ours.merge_and_unload()
    assert type(merged.bert.encoder["layer"][0].attention["self"]["query"]) is torch.nn.Linear
    torch.testing.assert_close(merged(**batch).logits, outputs[1].logits, rtol=1e-4, atol=1e-5)


def test_hooks_on_linear_layers_and_tables_are_called():
    """A hook may observe a layer or change its output, as NEFTune adds noise to the embeddings."""
    model = ours_of("SequenceClassification").eval()
    batch = collate(rows_of("SequenceClassification"))
    before, heard = model(**batch).logits, []
    modules = {name: m for name, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))}
    for name, module in modules.items():
        module.register_forward_hook(lambda module, given, output, name=name: heard.append(name))
    torch.testing.assert_close(model(**batch).logits, before)
    assert {*heard} == {*modules}
    model.get_input_embeddings().register_forward_hook(lambda module, given, output: output * 3.0)
    assert not torch.allclose(model(**batch).logits, before, atol=1e-2)


# ---- DDP and FSDP2 ---------------------------------------------------------------------------------------


@pytest.mark.once
def test_two_processes_have_the_gradients_of_one():
    script = Path(__file__).with_name("heads_in_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
