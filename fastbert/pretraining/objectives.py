"""Objectives of pre-training: their losses, and their scores on held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..models.head import IGNORED, at_least_float32
from ..training.metrics import Scores
from .batches import MaskedBatch
from .documents import NEXT_SENTENCE, SENTENCE_ORDER
from .masking import CLEAN, Masking


class Divisor(NamedTuple):
    """Divisors of the losses of a whole step: numbers of guessed tokens, of pairs, of tokens, and of examples."""

    guessed: float
    pairs: float
    tokens: float
    examples: float


class MaskedWords:
    """Masked words, by BertForMaskedLM."""

    PARTS: ClassVar[tuple[str, ...]] = ("masked_loss",)
    METRIC: ClassVar[str] = "masked_loss"  # the score that curve.svg shows
    pairs: ClassVar[str | None] = None

    def masking(self, tokenizer: Any, rule: str = CLEAN, share: float = 0.15, whole_words: bool = True) -> Masking:
        return Masking(tokenizer, rule, share, whole_words)

    def losses(self, model: nn.Module, batch: MaskedBatch, divisor: Divisor) -> tuple[Tensor, ...]:
        """The loss to differentiate, followed by the losses of PARTS."""
        loss = model(batch.shown, labels=batch.labels, num_items_in_batch=divisor.guessed).loss
        return loss, loss

    def tally(self, model: nn.Module, batch: MaskedBatch) -> dict[str, Any]:
        """The data of a batch for `scores`: numbers, which are summed over batches, and arrays, which are
        concatenated."""
        output = model(batch.shown, labels=batch.labels, num_items_in_batch=1, output_logits=True)
        return self._words(output.logits, batch.labels)

    def _words(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        wanted = labels[labels != IGNORED]
        logits = at_least_float32(logits)
        return {
            "guessed": len(wanted),
            "loss": float(nn.functional.cross_entropy(logits, wanted, reduction="sum")),
            "right": int((logits.argmax(-1) == wanted).sum()) if len(wanted) else 0,
        }

    def scores(self, found: dict[str, Any]) -> Scores:
        loss = _mean(found["loss"], found["guessed"])
        return Scores(
            {
                "masked_loss": loss, "perplexity": math.exp(min(loss, 700.0)),
                "masked_accuracy": _mean(found["right"], found["guessed"]),
            },
            {
                "masked_loss": f"nats: the mean over {found['guessed']:,} masked tokens",
                "perplexity": "exp(masked_loss): the number of equally probable words with the same loss",
                "masked_accuracy": "share of masked tokens whose most probable word is right",
            },
        )  # fmt: skip


class WordsAndPairs(MaskedWords):
    """Masked words, and whether the second segment follows or their order, by BertForPreTraining."""

    PARTS = ("masked_loss", "pair_loss")

    def __init__(self, pairs: str) -> None:
        self.pairs = pairs

    def losses(self, model: nn.Module, batch: MaskedBatch, divisor: Divisor) -> tuple[Tensor, ...]:
        output = model(
            batch.shown, labels=batch.labels, next_sentence_label=batch.pairs, num_items_in_batch=divisor.guessed,
            num_pairs_in_batch=divisor.pairs,
        )  # fmt: skip
        relation = at_least_float32(output.seq_relationship_logits.detach())
        of_pairs = nn.functional.cross_entropy(relation, batch.pairs, reduction="sum") / divisor.pairs
        return output.loss, output.loss.detach() - of_pairs, of_pairs

    def tally(self, model: nn.Module, batch: MaskedBatch) -> dict[str, Any]:
        output = model(
            batch.shown, labels=batch.labels, next_sentence_label=batch.pairs, num_items_in_batch=1,
            num_pairs_in_batch=1, output_logits=True,
        )  # fmt: skip
        relation = at_least_float32(output.seq_relationship_logits)
        return self._words(output.prediction_logits, batch.labels) | {
            "pairs": len(batch.pairs), "pairs right": int((relation.argmax(-1) == batch.pairs).sum())
        }  # fmt: skip

    def scores(self, found: dict[str, Any]) -> Scores:
        scores = super().scores(found)
        name = "next_sentence_accuracy" if self.pairs == NEXT_SENTENCE else "order_accuracy"
        accuracy = found["pairs right"] / found["pairs"]
        error = math.sqrt(max(accuracy * (1.0 - accuracy), 1.0 / found["pairs"]) / found["pairs"])
        what = f"of {found['pairs']:,} pairs, half of which are right; one standard error is {error:.4f}"
        return Scores({**scores.values, name: accuracy}, {**scores.definitions, name: what})


class ReplacedWords(MaskedWords):
    """Whether the generator replaced each token, by Electra."""

    PARTS = ("generator_loss", "discriminator_loss")
    METRIC = "detection_auc"

    def masking(self, tokenizer: Any, rule: str = CLEAN, share: float = 0.15, whole_words: bool = True) -> Masking:
        """Every token to guess is shown as [MASK]; the generator replaces all of them before the discriminator
        reads."""
        return Masking(tokenizer, rule, share, whole_words, shown_as_mask=1.0, shown_as_random=0.0)

    def _through(self, model: nn.Module, batch: MaskedBatch, divisor: Divisor) -> Any:
        return model(batch.shown, batch.labels, batch.uniform, divisor.guessed, divisor.tokens)

    def losses(self, model: nn.Module, batch: MaskedBatch, divisor: Divisor) -> tuple[Tensor, ...]:
        output = self._through(model, batch, divisor)
        return output.loss, output.generator_loss, output.discriminator_loss

    def tally(self, model: nn.Module, batch: MaskedBatch) -> dict[str, Any]:
        output = self._through(model, batch, Divisor(1, 1, 1, 1))
        return {
            "guessed": batch.guessed, "loss": float(output.generator_loss),
            "logits": output.logits.cpu().numpy(), "replaced": output.replaced.cpu().numpy(),
        }  # fmt: skip

    def scores(self, found: dict[str, Any]) -> Scores:
        loss = _mean(found["loss"], found["guessed"])
        logits, replaced = found["logits"], found["replaced"]
        told = logits > 0
        right = int((told & replaced).sum())
        both = int(told.sum() + replaced.sum())
        return Scores(
            {
                "detection_auc": area(logits, replaced), "detection_f1": 2 * right / both if both else 0.0,
                "generator_loss": loss, "generator_perplexity": math.exp(min(loss, 700.0)),
            },
            {
                "detection_auc": f"area under ROC, {len(told):,} tokens: how often a replaced one scores above another",
                "detection_f1": f"F1 of replaced tokens, which are {replaced.mean():.1%} of all tokens",
                "generator_loss": f"nats: the mean over {found['guessed']:,} masked tokens",
                "generator_perplexity": "exp(generator_loss)",
            },
        )  # fmt: skip


OBJECTIVES = {
    "mlm": MaskedWords,
    "mlm+nsp": lambda: WordsAndPairs(NEXT_SENTENCE),
    "mlm+sop": lambda: WordsAndPairs(SENTENCE_ORDER),
    "electra": ReplacedWords,
}


def _mean(total: float, count: int) -> float:
    """The mean, or nan if count is 0."""
    return total / count if count else math.nan


def area(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: the probability that a positive's score is above a negative's, with ties counting half;
    nan if there are only positives or only negatives."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - counts + 1 + ends) / 2  # the mean rank of each value, from 1 up
    n = int(positive.sum())
    others = len(positive) - n
    if not n or not others:
        return math.nan
    return float((ranks[inverse][positive].sum() - n * (n + 1) / 2) / (n * others))


def merged(tallies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The tallies of several batches: numbers are summed, arrays are concatenated."""
    return {
        name: np.concatenate([tally[name] for tally in tallies])
        if isinstance(value, np.ndarray)
        else sum(tally[name] for tally in tallies)
        for name, value in tallies[0].items()
    }
