"""Heads under other people's loops: transformers' Trainer, PEFT, and torch's DDP and FSDP2."""

import copy

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
    """Examples with labels of which the parts of a step have different numbers."""
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
    """In one batch and in four, where transformers' own BERT takes a step four times as long, and one that depends on
    how the labels are spread."""
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
            # SGD at 0.1: an error of the gradient shows in the weights a tenth as large
            torch.testing.assert_close(
                p, q - 0.1 * q.grad, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.once
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM"])
def test_trainer_evaluates_predicts_saves_and_goes_on(head, tmp_path):
    model = ours_of(head)
    rows = rows_of(head)
    trainer = trainer_of(model, rows, tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    with torch.no_grad():
        expected = model.eval()(**collate(rows))
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    if head != "MaskedLM":  # with labels it has no logits
        labels = ("labels", "start_positions", "end_positions")
        unlabelled = [{name: t for name, t in row.items() if name not in labels} for row in rows]
        for given in (rows, unlabelled):
            found = trainer.predict(given).predictions
            found = found if isinstance(found, tuple) else (found,)
            for ours, theirs in zip(found, [t for name, t in expected.items() if name != "loss"], strict=True):
                torch.testing.assert_close(torch.from_numpy(ours), theirs)

    again = ours_of(head)
    trainer = trainer_of(again, rows, tmp_path, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=True)  # at its one step already
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
