"""Fine-tuning with transformers' Trainer on a fast model: `python examples/trainer.py`. Downloads nothing."""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fastbert


def made_up_task(count: int = 64) -> list[dict]:
    """Does the word 7 occur?"""
    texts = [torch.randint(8, 100, (12,)) for _ in range(count)]
    for text in texts[::2]:
        text[int(torch.randint(12, ()))] = 7
    return [{"input_ids": text, "labels": int(7 in text)} for text in texts]


def main(steps: int = 20) -> list[float]:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    model = fastbert.accelerate(BertForSequenceClassification(config))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, learning_rate=1e-3, logging_steps=1, report_to="none", use_cpu=True,
            per_device_train_batch_size=16, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=made_up_task())
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
