"""Pre-training from text to a folder: tokenizer, corpus, model, loop, and a report."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..encoding.encoder import resolve_dtype
from ..models.bert import BertModel
from ..models.head import expecting_new_weights
from ..models.heads import BertForMaskedLM, BertForPreTraining
from ..storage import CheckpointError, write_json
from ..text.files import InputError
from ..text.folder import read_vocab
from ..text.tokenizer import Tokenizer
from ..training.checkpoints import folder_of_run
from ..training.curve import draw
from ..training.finetune import state_within
from ..training.loop import Settings, TrainingError, forget_after
from ..training.metrics import Scores
from ..training.processes import Processes
from .batches import Loader
from .chinese import segmenter_of
from .corpus import Corpus, build_corpus, tokenizer_digest
from .documents import check_pairs, longest_segment
from .electra import Electra
from .masking import CLEAN
from .objectives import OBJECTIVES, MaskedWords
from .plan import PretrainingPlan
from .run import Evaluation, Pretraining
from .sizes import NEVER_PREDICTED, config_of, default_rate
from .texts import files_of
from .vocabulary import train_tokenizer

TRAIN = "train"  # as the tokenizer's name: train one on the corpus


@dataclass(frozen=True)
class Request:
    """The arguments of `fastbert pretrain`, under the same names."""

    corpus: tuple[str, ...]
    out: Path
    objective: str = "mlm"
    config: str = "tiny"
    init: str | None = None
    tokenizer: str = TRAIN
    vocab_size: int = 30522
    cased: bool = False
    alphabet: int | None = None
    min_frequency: int = 2
    pad_vocab: int = 64
    field: str = "text"
    max_line_bytes: int = 10_000_000
    eval: tuple[str, ...] = ()
    max_length: int = 128
    masking: str = CLEAN
    mask_share: float = 0.15
    whole_words: bool = True
    segmenter: str | None = None
    steps: int = 0
    seconds: float = 0.0
    batch_tokens: int = 8192
    growing: int = 0
    memory_tokens: int = 8192
    lr: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    dropout: float = 0.1
    seed: int = 0
    workers: int = 1
    save_every: int = 1000
    evaluate_every: int = 1000
    keep: int = 2
    resume: bool = False
    dtype: str = "auto"
    device: str = "auto"
    fsdp: bool = False
    checkpoint_activations: bool = False
    impl: str | None = None


def pretrain(request: Request, report: Callable[[dict[str, Any], int], None] | None = None) -> dict[str, Any]:
    """Runs pre-training; returns the content of report.json.

    report: called in the first process with each record of metrics.jsonl and the number of all steps (0 if unknown).

    Raises: InputError, TrainingError or CheckpointError, in one line; KeyboardInterrupt after a checkpoint.
    """
    with Processes.join(request.device) as processes:
        return _pretrain(request, processes, report)


@dataclass(frozen=True)
class Learner:
    """What is trained, and what the report says of it.

    Attributes:
        model: what is saved. trained: what the loop trains: the model, or a module that holds it.
        facts, binding: what the report has, and what must be the same where the run goes on, beyond what every
            pre-training has there.
    """

    objective: MaskedWords
    model: nn.Module
    trained: nn.Module
    facts: dict[str, Any] = field(default_factory=dict)
    binding: dict[str, Any] = field(default_factory=dict)


def _pretrain(request: Request, processes: Processes, report: Any) -> dict[str, Any]:
    return carry_out(request, processes, report, _learner)


def _learner(request: Request, tokenizer: Tokenizer, processes: Processes) -> Learner:
    model = make_model(request, tokenizer).to(processes.device)
    return Learner(OBJECTIVES[request.objective](), model, model)


def carry_out(
    request: Request, processes: Processes, report: Any, prepare: Callable[[Request, Tokenizer, Processes], Learner]
) -> dict[str, Any]:
    """A run on text, from what `prepare` makes of the request to the folder; what lies in report.json then."""
    out = folder_of_run(request.out, request.resume, request.init or "")
    tokenizer = processes.in_turn(lambda: _tokenizer(request, out, makes=processes.rank == 0))
    learner = prepare(request, tokenizer, processes)
    objective, model = learner.objective, learner.model
    corpus, held_out = processes.in_turn(lambda: _corpora(request, out, tokenizer, objective))
    if request.checkpoint_activations:
        model.gradient_checkpointing_enable()
    masking = objective.masking(tokenizer, request.masking, request.mask_share, request.whole_words)
    plan = PretrainingPlan(
        corpus, objective.pairs, request.max_length, request.seed, request.batch_tokens, request.memory_tokens,
        request.growing,
    )  # fmt: skip
    dtype = resolve_dtype(request.dtype, processes.device)
    lr = default_rate(model.config) if request.lr is None else request.lr
    settings = Settings(
        epochs=0, step_tokens=request.batch_tokens, batch_tokens=request.memory_tokens, lr=lr, seed=request.seed,
        warmup=request.warmup, weight_decay=request.weight_decay, clip=request.clip, dtype=dtype,
        save_every=request.save_every, keep=request.keep, seconds=request.seconds,
        fsdp=request.fsdp,
    )  # fmt: skip
    evaluate = None
    if held_out is not None:
        evaluate = Evaluation(
            held_out, objective, masking, request.max_length, request.memory_tokens, dtype, processes
        )  # fmt: skip
    unknown = corpus.facts["unknown tokens"] / corpus.facts["tokens"]
    facts = {
        "corpus": list(request.corpus), "objective": request.objective, "model": request.init or request.config,
        "parameters": sum(p.numel() for p in model.parameters()), "vocabulary": tokenizer.vocab_size,
        "rows of the vocabulary's table": model.config.vocab_size, "tokens": corpus.facts["tokens"],
        "documents": corpus.facts["documents"], "sentences": corpus.facts["segments"], "unknown share": unknown,
        "tokens joined by the segmenter": corpus.facts["tokens joined by the segmenter"],
        "examples of the first epoch": len(plan.epoch(0).examples),
        "sentences in no pair": plan.epoch(0).examples.left_out, "steps of the first epoch": len(plan.steps(0)),
        "tokens a step": request.batch_tokens, "max length": request.max_length, "masking": request.masking,
        "learning rate": lr, "seed": request.seed, "products in": str(dtype).removeprefix("torch."),
        "processes": processes.count, "eval": list(request.eval),
        "unigram entropy": None if held_out is None else held_out.unigram_entropy(), **learner.facts,
    }  # fmt: skip

    def keep(shared: nn.Module, scores: Scores | None) -> None:
        state = state_within(shared, learner.trained, model)
        if processes.rank == 0:
            tokenizer.save_pretrained(out)
            model.save_pretrained(out, state)
            values = None if scores is None else {k: None if math.isnan(v) else v for k, v in scores.values.items()}
            found = {"scores": values, "definitions": scores and scores.definitions}
            write_json(out / "report.json", {**facts, **found, "steps": run.progress.step})

    loader = Loader(plan, masking, processes.rank, processes.count, request.workers)
    run = Pretraining(
        learner.trained, objective, plan, loader, settings, request.steps, request.evaluate_every, out, processes,
        evaluate=evaluate, keep=keep,
        binding={
            "objective": request.objective, "max length": request.max_length, "masking": request.masking,
            "mask share": request.mask_share, "whole words": request.whole_words, "growing": request.growing,
            "dropout": request.dropout, "steps": request.steps, "corpus of SHA-256": corpus.digest,
            "tokenizer of SHA-256": tokenizer_digest(tokenizer), **learner.binding,
        },
    )  # fmt: skip
    done = run.resume() if request.resume else 0
    if processes.rank == 0:
        forget_after(out / "metrics.jsonl", done)
    run.report = None if report is None else lambda record: report(record, run.steps)
    try:
        run.train()
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of the printed progress is gone; files are not affected
            raise
        what = f"cannot write into {out}: {error.strerror or error}"
        raise TrainingError(f"{what}; {run.remains()}") from error
    finally:
        loader.close()
    if processes.rank == 0:
        draw(out / "metrics.jsonl", out / "curve.svg", objective.METRIC)
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def _tokenizer(request: Request, out: Path, makes: bool) -> Tokenizer:
    """The tokenizer: that of the initial model, a given one, or one trained on the corpus. The latter is kept in
    OUT/tokenizer for --resume and for the other processes.

    makes: whether this process trains it if the run begins.
    """
    if request.init is not None:
        return Tokenizer.from_pretrained(request.init)
    if request.tokenizer != TRAIN:
        if Path(request.tokenizer).suffix == ".txt":
            return _of_vocabulary(Path(request.tokenizer), request.cased)
        return Tokenizer.from_pretrained(request.tokenizer)
    folder = out / "tokenizer"
    kept = (folder / "tokenizer_config.json").exists()
    if makes and not (request.resume and kept):
        made, _ = train_tokenizer(
            files_of(request.corpus), request.vocab_size, lowercase=not request.cased, alphabet=request.alphabet,
            min_frequency=request.min_frequency, field=request.field, line_bytes=request.max_line_bytes,
        )  # fmt: skip
        made.save_pretrained(folder)
    return Tokenizer.from_pretrained(folder)


def _of_vocabulary(file: Path, cased: bool) -> Tokenizer:
    """Raises InputError if text in lower case would never use some of the words."""
    if not cased:
        upper = next((word for word in read_vocab(file) if re.match(r"(##)?[A-Z]", word)), None)
        if upper is not None:
            raise InputError(f"{file} has words in upper case, such as {upper}: give --cased")
    return Tokenizer.from_vocab(file, lowercase=not cased)


def _corpora(
    request: Request, out: Path, tokenizer: Tokenizer, objective: MaskedWords
) -> tuple[Corpus, Corpus | None]:  # fmt: skip
    """The corpus for training, and the held-out corpus or None."""
    segmenter = None if request.segmenter is None else segmenter_of(request.segmenter)
    made = []
    for name, paths in (("corpus", request.corpus), ("held-out", request.eval)):
        if paths:
            corpus = build_corpus(
                out / name, paths, tokenizer, longest_segment(request.max_length), segmenter=segmenter,
                field=request.field, line_bytes=request.max_line_bytes,
            )  # fmt: skip
            check_pairs(corpus, objective.pairs, ", ".join(paths))
            made.append(corpus)
    return made[0], made[1] if len(made) > 1 else None


def make_model(request: Request, tokenizer: Tokenizer) -> nn.Module:
    """A new model, initialised by the seed, or a model from a checkpoint.

    Raises: CheckpointError if a checkpoint does not fit.
    """
    kind = {"mlm": BertForMaskedLM, "electra": BertModel}.get(request.objective, BertForPreTraining)
    torch.manual_seed(request.seed)
    if request.init is not None:
        model = _initial(request, kind, tokenizer)
    else:
        config = config_of(request.config, tokenizer.vocab_size, request.max_length, request.pad_vocab, request.dropout)
        if kind is BertModel:
            model = Electra(BertModel(config, add_pooling_layer=False, impl=request.impl))
        else:
            model = kind(config, request.impl)
    if kind is BertModel:
        bias, is_new = model.generator_bias, True
    else:
        bias = model.cls["predictions"].bias
        is_new = request.init is None or "cls.predictions.bias" in model.initialised
    if is_new:  # the bias of a checkpoint is not changed
        with torch.no_grad():
            bias[tokenizer.vocab_size :] = NEVER_PREDICTED
    return model


def _initial(request: Request, kind: Any, tokenizer: Tokenizer) -> nn.Module:
    with expecting_new_weights():  # a checkpoint may lack the heads of this objective
        options = {"dtype": torch.float32, "impl": request.impl}
        if kind is BertModel:
            bert = kind.from_pretrained(request.init, add_pooling_layer=False, **options)
            bert.config.hidden_dropout_prob = bert.config.attention_probs_dropout_prob = request.dropout
            bert.embeddings.dropout_p = request.dropout
            model = Electra(bert)
        else:
            changes = {"hidden_dropout_prob": request.dropout, "attention_probs_dropout_prob": request.dropout}
            model = kind.from_pretrained(request.init, seed=request.seed, **options, **changes)
    config = model.config
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{request.init}: its tokenizer has {tokenizer.vocab_size:,} words, and its model {config.vocab_size:,} "
            "rows: it is the tokenizer of another model"
        )
    if request.max_length > config.max_position_embeddings:
        raise CheckpointError(
            f"{request.init} takes {config.max_position_embeddings} tokens at most, fewer than --max-length "
            f"{request.max_length}"
        )
    return model
