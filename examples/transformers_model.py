"""A model of transformers, made fast in place: `python examples/transformers_model.py`. Downloads nothing."""

import torch
from transformers import BertConfig, BertForSequenceClassification

import fastbert


def main() -> None:
    # stands for BertForSequenceClassification.from_pretrained("your/model")
    torch.manual_seed(0)
    config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_labels=3)
    model = BertForSequenceClassification(config).eval()
    ids = torch.randint(1000, 2000, (4, 32))
    mask = (torch.arange(32) < torch.tensor([32, 5, 17, 9])[:, None]).long()

    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        fastbert.accelerate(model)
        after = model(input_ids=ids, attention_mask=mask).logits
    print(fastbert.explain(model))
    print(f"largest difference of a logit: {(before - after).abs().max():.1e}")
    assert torch.allclose(before, after, atol=1e-5)

    fastbert.restore(model)  # as it was


if __name__ == "__main__":
    main()
