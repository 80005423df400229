"""A small corpus and small runs for the tests of pre-training."""

import random
import sys
from pathlib import Path

import torch

from fastbert import BertConfig, Tokenizer
from fastbert.models.bert import BertModel
from fastbert.models.heads import BertForMaskedLM, BertForPreTraining
from fastbert.pretraining.batches import Loader
from fastbert.pretraining.corpus import build_corpus
from fastbert.pretraining.documents import longest_segment
from fastbert.pretraining.electra import Electra
from fastbert.pretraining.objectives import OBJECTIVES
from fastbert.pretraining.plan import PretrainingPlan
from fastbert.pretraining.run import Evaluation, Pretraining
from fastbert.training.loop import Settings
from fastbert.training.processes import Processes

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *"abcdefghij", *(f"##{c}" for c in "abcdefghij")]
LENGTH = 24
ALONE = Processes(0, 1, torch.device("cpu"))


def text_of(documents: int = 12, seed: int = 0) -> str:
    """Documents of ten lines. Each line is a run of letters in the order of the alphabet, some of them doubled."""
    draw = random.Random(seed)
    made = []
    for number in range(documents):
        lines = []
        for _ in range(10):
            start = draw.randrange(10)
            of_line = ["abcdefghij"[(start + i * (1 + number % 2)) % 10] * draw.choice((1, 2)) for i in range(6)]
            lines.append(" ".join(of_line) + " .")
        made.append("\n".join(lines))
    return "\n\n".join(made) + "\n"


def tokenizer_of_words() -> Tokenizer:
    return Tokenizer.from_words(WORDS, lowercase=True)


def model_of(objective: str, dropout: float = 0.1, impl: str = "native", seed: int = 0, rows: int = len(WORDS)):
    config = BertConfig(
        vocab_size=rows, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=LENGTH, initializer_range=0.2, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    torch.manual_seed(seed)
    if objective == "electra":
        return Electra(BertModel(config, add_pooling_layer=False, impl=impl))
    return (BertForMaskedLM if objective == "mlm" else BertForPreTraining)(config, impl=impl)


def run_of(
    out: Path, objective: str = "mlm+nsp", processes: Processes = ALONE, dropout: float = 0.1, impl: str = "native",
    workers: int = 0, steps: int = 6, evaluated: bool = False, growing: int = 0, **options,
) -> Pretraining:  # fmt: skip
    """A run of a small model. `options` are fields of Settings. `out`/text.txt is written if it is absent."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "text.txt").exists():
        (out / "text.txt").write_text(text_of())
    tokenizer, learnt = tokenizer_of_words(), OBJECTIVES[objective]()
    corpus = build_corpus(out / "corpus", [out / "text.txt"], tokenizer, longest_segment(LENGTH))
    chosen = {"epochs": 0, "step_tokens": 300, "batch_tokens": 10**6, "lr": 2e-3, "seed": 3, **options}
    settings = Settings(**chosen)
    masking = learnt.masking(tokenizer)
    plan = PretrainingPlan(
        corpus, learnt.pairs, LENGTH, settings.seed, settings.step_tokens, settings.batch_tokens, growing
    )  # fmt: skip
    loader = Loader(plan, masking, processes.rank, processes.count, workers)
    evaluate = Evaluation(corpus, learnt, masking, LENGTH, 500, settings.dtype, processes) if evaluated else None
    model = model_of(objective, dropout, impl)
    return Pretraining(model, learnt, plan, loader, settings, steps, 3, out, processes, evaluate=evaluate)


def gradients(run: Pretraining) -> dict[str, torch.Tensor]:
    """The gradients of the first step of the second epoch."""
    run.shared.train()
    run.loss_of_step = run._gradients(run.plan.steps(1)[0], 1)
    return {name: p.grad.clone() for name, p in run.model.named_parameters()}


if __name__ == "__main__":
    # One of the two processes of a test: python pretraining_models.py OBJECTIVE DDP_OUT FSDP_OUT
    torch.set_num_threads(1)
    joined = Processes.join("cpu")
    for out, fsdp in ((sys.argv[2], False), (sys.argv[3], True)):
        run_of(
            Path(out), sys.argv[1], joined, batch_tokens=80, evaluated=True, fsdp=fsdp, workers=1, save_every=3, keep=9
        ).train()
    joined.leave()
